"""`python -m laser_jax.train --dry_run`: compiles a step for the asked mesh and says what it takes.

Nothing is loaded, drawn or written. Of the model only `config.json` is read, or, with
`model.backbone`, nothing at all; of the training rows the first batches, where they are there.
"""

import logging
import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies

from laser_jax.batch import Batch, Tokens
from laser_jax.command_line import Invocation
from laser_jax.config import BACKBONES, BackboneConfig, Config, ConfigError
from laser_jax.data.pipeline import training_batches
from laser_jax.data.sources import is_there, open_sources, rows_per_epoch
from laser_jax.data.tokenization import PromptTokenizer, load_tokenizer
from laser_jax.hf.directory import read_backbone_config
from laser_jax.sharding import Device, batch_sharding
from laser_jax.step import reading
from laser_jax.train.layout import (
    Layout,
    describe_mesh,
    device_state_bytes,
    lay_out,
    number_of_steps,
    shape_of,
    step_programs,
)
from laser_jax.train.throughput import GIB, device_bytes, peak_flops, step_flops

_log = logging.getLogger(__name__)
BATCHES_LOOKED_AT = 64
Widths = tuple[int, ...]
"""Widths of a padded batch: of queries, documents and, where they are read, explicit inputs."""


@dataclass(frozen=True)
class Expected:
    """The batches of a run."""

    buckets: Counter[Widths]
    """How many batches have which widths; without rows to look at, one of the widest possible."""
    tokens: float  # of a step, on average
    token_pairs: float
    padding_share: float
    source: str  # where this is known from

    @property
    def widest(self) -> Widths:
        """The largest of each width; a later batch may have them together."""
        return tuple(map(max, zip(*self.buckets, strict=True)))

    @property
    def counts(self) -> dict[str, int]:
        """The buckets in words, the most frequent first."""
        names = ("queries", "documents", "explicit")
        return {
            ", ".join(f"{name} {width}" for name, width in zip(names, widths, strict=False)): count
            for widths, count in self.buckets.most_common()
        }


def dry_run(config: Config, invocation: Invocation) -> dict[str, Any]:
    """Compiles the step for the widest batch, and prints and returns what it takes; bytes are of
    one device. Raises as a run would, and a ConfigError where the topology cannot be had."""
    devices = _devices(invocation)
    backbone = _backbone(config)
    expected, rows = _expected(config)
    layout = lay_out(config, backbone, number_of_steps(config, rows or 1), devices)
    batch = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=batch_sharding(layout.mesh)),
        _full_batch(config, expected.widest),
    )
    found = _described(config, layout, expected, devices)
    found["widest"] = shape_of(batch)
    _log.info("compiling %s", found["widest"])
    found |= _compile(config, layout, batch)
    if "does_not_fit" in found:
        print(f"memory      does not fit: {found['does_not_fit']}")
        return found
    sizes = [_gib(found[f"{part}_bytes"]) for part in ("peak", "argument", "temporary")]
    print(f"compiled    {found['widest']} in {found['compile_seconds']:.0f} s")
    print("memory      {} a device at most: {} arguments, {} temporaries".format(*sizes))
    if (room := device_bytes(devices[0])) is not None:
        found["device_bytes"] = room
        print(f"            of {_gib(room)}, {found['peak_bytes'] / room:.0%}")
    return found


def _described(
    config: Config, layout: Layout, expected: Expected, devices: Sequence[Device]
) -> dict[str, Any]:
    """Prints and returns what is known before anything is compiled."""
    trained, total = layout.parameters
    read = (expected.tokens, expected.token_pairs)
    flops = step_flops(config, layout.backbone.config, *read)
    peak = peak_flops(config, devices[0])
    found: dict[str, Any] = {
        "device": f"{len(devices)} x {devices[0].device_kind}",
        "mesh": dict(layout.mesh.shape),
        "parameters": total,
        "trained_parameters": trained,
        "attention": layout.attention,
        "buckets": expected.counts,
        "tokens_per_step": round(expected.tokens),
        "padding_share": expected.padding_share,
        "flops_per_step": flops,
        "state_bytes": device_state_bytes(layout.abstract),
    }
    print(f"device      {found['device']}, mesh {describe_mesh(layout.mesh)}")
    print(f"model       {total:,} parameters, {trained:,} trained, {config.model.dtype}")
    print(f"attention   {layout.attention}")
    print(f"buckets     {len(expected.buckets)} {expected.source}")
    for widths, count in islice(expected.counts.items(), 12):
        print(f"              {count} x {widths}")
    print(f"tokens      {expected.tokens:,.0f} a step without padding, {expected.source}")
    print(f"padding     {expected.padding_share:.1%} of the places in its arrays")
    if flops is not None:
        print(f"FLOPs       {flops:.3e} a step by formula (docs/scale.md)", end="")
        print(f", {flops / peak / len(devices):.2f} s at the devices' peak" if peak else "")
    print(f"state       {_gib(found['state_bytes'])} a device: weights, optimizer and gradient")
    return found


def _devices(invocation: Invocation) -> Sequence[Device]:
    wanted = invocation.dry_run
    if isinstance(wanted, bool):
        return jax.devices()
    if not (wanted.isascii() and wanted.isdecimal()):
        return devices_to_compile_for(wanted)
    try:  # before jax looks for devices, which it does once
        jax.config.update("jax_num_cpu_devices", int(wanted))
    except RuntimeError as error:
        raise ConfigError(
            f"--dry_run {wanted}: jax has already made its devices in this process; start another "
            "for this dry run"
        ) from error
    return jax.devices("cpu")


def devices_to_compile_for(topology: str) -> Sequence[Device]:
    """TPU slices that are not here, for which programs can be compiled: `topology` is a TPU and its
    chips, such as v5e:4x4. Takes jax's own devices to be the CPU, so that an accelerator of this
    machine stays free. Raises a ConfigError where there are no such devices, or no compiler."""
    jax.config.update("jax_platforms", "cpu")
    # no question to a cloud's metadata server, and two dry runs may be under way at once
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    options: dict[str, Any] = {}
    if topology.startswith("v4:"):
        options["chip_config_name"] = "megacore"  # else a chip counts as two devices
    if topology.endswith(":1x1"):
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        return topologies.get_topology_desc(topology, "tpu", **options).devices
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"--dry_run {topology}: {error}. Names are such as v5e:4x4, v6e:2x4, v4:2x2x2 and "
            "v5p:2x2x2, of TPU chips; `pip install 'laser-jax[tpu]'` brings their compiler. For "
            "GPUs give --dry_run alone, on a machine that has one"
        ) from error


def _backbone(config: Config) -> BackboneConfig:
    model = config.model
    if model.scratch is not None:
        return model.scratch.backbone(model.scratch.vocab_size)
    assert model.path is not None
    if not Path(model.path).exists():
        if model.backbone is None:
            raise ConfigError(
                f"model.path {model.path}: no such directory, and a dry run downloads nothing. Set "
                f"model.backbone to what it is, one of {', '.join(BACKBONES)}"
            )
        return BACKBONES[model.backbone]
    found = read_backbone_config(model.path)
    model.require_named_backbone(found)
    return found


def _expected(config: Config) -> tuple[Expected, int | None]:
    """The batches, and the rows of an epoch where they are there."""
    path, rows = config.model.path, None
    if all(is_there(source.path) for source in config.data.sources):
        sources = open_sources(config.data)
        rows = rows_per_epoch(sources)
        if path is not None and Path(path).is_dir():
            prompts = PromptTokenizer(load_tokenizer(path), config.prompt)
            here = replace(config, data=replace(config.data, workers=0))
            wanted = min(BATCHES_LOOKED_AT, -(-rows // config.train.batch_size))
            batches = list(islice(training_batches(sources, prompts, here), wanted))
            return _counted(config, batches, f"in the first {wanted} batches of the rows"), rows
    prompt, multiple = config.prompt, config.data.length_multiple
    longest = (prompt.query_max_length, prompt.document_max_length)
    if config.objective.need_explicit_view:
        most = prompt.explicit_max_length + prompt.one_string * prompt.append_eos_to_reasoning
        longest += (-(-most // multiple) * multiple,)
    where = "at the limits of the prompts (no rows or no tokenizer to count with)"
    return _counted(config, [_full_batch(config, longest)], where), rows


def _counted(config: Config, batches: Sequence[Batch], source: str) -> Expected:
    buckets: Counter[Widths] = Counter()
    tokens = pairs = padding = 0.0
    for batch in batches:
        parts = filter(None, (batch.query, batch.documents, batch.explicit))
        buckets[tuple(part.ids_BT.shape[1] for part in parts)] += 1
        found = reading(batch, config)
        tokens += float(found["tokens"]) / len(batches)
        pairs += float(found["token_pairs"]) / len(batches)
        padding += float(found["padding_share"]) / len(batches)
    return Expected(buckets, tokens, pairs, padding, source)


def _full_batch(config: Config, widths: Widths) -> Batch:
    """A batch without padding."""
    B, K = config.train.batch_size, config.objective.num_thinking_steps
    C, (query, document, *explicit) = B * config.data.group_size, widths
    taught = config.objective.need_teacher_scores

    def tokens(rows: int, width: int) -> Tokens:
        return Tokens(np.zeros((rows, width), np.int32), np.full(rows, width, np.int32))

    return Batch(
        query=tokens(B, query),
        documents=tokens(C, document),
        explicit=tokens(B, *explicit) if explicit else None,
        keyframes_BK=np.zeros((B, K), np.int32) if explicit else None,
        contrast_BC=np.ones((B, C), np.bool_),
        teacher_scores_BG=np.zeros((B, C // B), np.float32) if taught else None,
    )


def _compile(config: Config, layout: Layout, batch: Batch) -> dict[str, Any]:
    programs, began = step_programs(config, layout), time.monotonic()
    try:
        with jax.set_mesh(layout.mesh):
            compiled = programs.compile(layout.abstract, batch, layout.abstract_teacher)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {"does_not_fit": str(error).splitlines()[0]}
    memory: Any = compiled.memory_analysis()
    arguments, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    # the CPU's compiler leaves its temporaries out of the peak; of others the sum of the parts is
    # too much, since they count those that never live together once
    parts = arguments + temporaries + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return {
        "compile_seconds": time.monotonic() - began,
        "argument_bytes": arguments,
        "temporary_bytes": temporaries,
        "peak_bytes": parts if layout.platform == "cpu" else memory.peak_memory_in_bytes,
    }


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB"
