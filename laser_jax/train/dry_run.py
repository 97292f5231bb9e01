"""`python -m laser_jax.train --dry_run`: compiles a step for the asked mesh and says what it takes.

Nothing is loaded, drawn or written. Of the model only `config.json` is read, or, with
`model.backbone`, nothing at all; of the training rows the first batches, where they are there.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from laser_jax.batch import Batch, Tokens
from laser_jax.config import (
    BACKBONES,
    BackboneConfig,
    Config,
    ConfigError,
    Invocation,
    load_retriever_config,
)
from laser_jax.data.pipeline import training_batches
from laser_jax.data.sources import is_there, open_sources, rows_per_epoch
from laser_jax.data.tokenization import PromptTokenizer, load_tokenizer
from laser_jax.hf.directory import read_backbone_config
from laser_jax.modeling.backbone import Backbone
from laser_jax.sharding import Device, batch_sharding
from laser_jax.step import FrozenTeacher, abstract_variables, jit_train_step, make_train_step
from laser_jax.train.layout import Layout, describe_mesh, lay_out, number_of_steps
from laser_jax.train.programs import StepPrograms, shape_of
from laser_jax.train.throughput import (
    GIB,
    device_bytes,
    peak_flops,
    reading_of,
    step_flops,
)
from laser_jax.train.topologies import devices_to_compile_for

BATCHES_LOOKED_AT = 64


@dataclass(frozen=True)
class Lengths:
    """Padded widths of a batch."""

    query: int
    document: int
    explicit: int | None


@dataclass(frozen=True)
class Expected:
    """The batches of a run."""

    buckets: dict[Lengths, int]
    """How many batches have which widths; without rows to look at, one of the widest possible."""
    tokens: float
    """Of a step, on average."""
    token_pairs: float
    source: str
    """Where this is known from."""


def dry_run(config: Config, invocation: Invocation) -> dict[str, Any]:
    """Compiles the step for the widest batch and prints what it takes.

    Returns:
        What was printed, in plain types; bytes are of one device.

    Raises:
        ConfigError: as a run would, or the topology cannot be had.
    """
    devices = _devices(invocation)
    backbone_config = _backbone(config)
    expected, rows = _expected(config)
    layout = lay_out(config, backbone_config, number_of_steps(config, rows or 1), devices)
    trained, total = layout.parameters
    widest = _widest(expected.buckets)
    reading = reading_of(config, expected.tokens, expected.token_pairs)
    # a frozen teacher reads without a backward pass, which the formula does not know
    flops = None
    if config.objective.teacher is None:
        flops = step_flops(backbone_config, reading, trains_base=config.lora is None)
    peak = peak_flops(config, devices[0])
    batch = _abstract_batch(config, widest, layout)
    found: dict[str, Any] = {
        "device": f"{len(devices)} x {devices[0].device_kind}",
        "mesh": dict(layout.mesh.shape),
        "parameters": total,
        "trained_parameters": trained,
        "attention": layout.attention,
        "widest": shape_of(batch),
        "buckets": {_widths(lengths): count for lengths, count in expected.buckets.items()},
        "tokens_per_step": round(expected.tokens),
        "flops_per_step": flops,
        "state_bytes": layout.device_state_bytes(),
    }
    print(f"device      {found['device']}, mesh {describe_mesh(layout.mesh)}")
    print(f"model       {total:,} parameters, {trained:,} trained, {config.model.dtype}")
    print(f"attention   {layout.attention}")
    print(f"buckets     {len(expected.buckets)} {expected.source}")
    for lengths, count in sorted(expected.buckets.items(), key=lambda item: -item[1])[:12]:
        print(f"              {count} x {_widths(lengths)}")
    print(f"tokens      {expected.tokens:,.0f} a step without padding, {expected.source}")
    if flops is not None:
        print(f"FLOPs       {flops:.3e} a step by formula (docs/scale.md)", end="")
        print(f", {flops / peak / len(devices):.2f} s at the devices' peak" if peak else "")
    print(f"state       {_gib(found['state_bytes'])} a device: weights, optimizer and gradient")
    print(f"compiling   {found['widest']}", flush=True)
    found |= _compile(config, layout, batch)
    if "peak_bytes" not in found:
        print(f"memory      does not fit: {found['does_not_fit']}")
        return found
    print(f"compiled    in {found['compile_seconds']:.0f} s")
    print(
        f"memory      {_gib(found['peak_bytes'])} a device at most: "
        f"{_gib(found['argument_bytes'])} arguments, {_gib(found['temporary_bytes'])} temporaries"
    )
    room = device_bytes(devices[0])
    if room is not None:
        found["device_bytes"] = room
        print(f"            of {_gib(room)}, {found['peak_bytes'] / room:.0%}")
    return found


def _devices(invocation: Invocation) -> Sequence[Device]:
    if invocation.devices is not None:
        # before jax looks for devices, which it does once
        try:
            jax.config.update("jax_num_cpu_devices", invocation.devices)
        except RuntimeError as error:
            raise ConfigError(
                f"--devices {invocation.devices}: jax has already made its devices in this "
                "process; start another for this dry run"
            ) from error
        return jax.devices("cpu")
    if invocation.topology is None:
        return jax.devices()
    return devices_to_compile_for(invocation.topology)


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
    prompt, data = config.prompt, config.data
    path = config.model.path
    there = all(is_there(source.path) for source in data.sources)
    rows, prompts = None, None
    if there:
        rows = rows_per_epoch(open_sources(data))
        if path is not None and Path(path).is_dir():
            prompts = PromptTokenizer(load_tokenizer(path), prompt)
    if prompts is not None and rows is not None:
        return _counted(config, prompts, rows), rows
    multiple = data.length_multiple
    explicit = -(-prompt.explicit_max_length // multiple) * multiple
    widest = Lengths(
        prompt.query_max_length,
        prompt.document_max_length,
        explicit if config.objective.need_explicit_view else None,
    )
    lengths = [widest.document] * data.group_size
    if widest.explicit is not None:
        lengths.append(widest.explicit)
    if widest.explicit is None or config.views == "parity" or config.objective.teacher:
        lengths.append(widest.query)
    B = config.train.batch_size
    return Expected(
        {widest: 1},
        float(B * sum(lengths)),
        float(B * sum(n * (n + 1) / 2 for n in lengths)),
        "at the limits of the prompts (no rows or no tokenizer to count with)",
    ), rows


def _counted(config: Config, prompts: PromptTokenizer, rows: int) -> Expected:
    sources, B = open_sources(config.data), config.train.batch_size
    wanted = min(BATCHES_LOOKED_AT, -(-rows // B))
    batches = training_batches(
        sources,
        prompts,
        replace(config.data, workers=0),
        num_steps=config.objective.num_thinking_steps,
        keyframes=config.objective.keyframes,
        batch_size=B,
        seed=config.train.seed,
        need_explicit=config.objective.need_explicit_view,
        shared_prefix=False,
    )
    buckets: Counter[Lengths] = Counter()
    tokens = pairs = 0.0
    for batch in islice(batches, wanted):
        read = [batch.documents]
        if batch.explicit is not None:
            read.append(batch.explicit)
        if batch.explicit is None or config.views == "parity" or config.objective.teacher:
            read.append(batch.query)
        lengths = np.concatenate([part.lengths_B for part in read]).astype(float)
        tokens += lengths.sum() / wanted
        pairs += (lengths * (lengths + 1) / 2).sum() / wanted
        buckets[
            Lengths(
                batch.query.ids_BT.shape[1],
                batch.documents.ids_BT.shape[1],
                None if batch.explicit is None else batch.explicit.ids_BT.shape[1],
            )
        ] += 1
    return Expected(dict(buckets), tokens, pairs, f"in the first {wanted} batches of the rows")


def _widest(buckets: dict[Lengths, int]) -> Lengths:
    """The largest of each width; a later batch may have them together."""
    explicit = [b.explicit for b in buckets if b.explicit is not None]
    return Lengths(
        max(b.query for b in buckets), max(b.document for b in buckets), max(explicit, default=None)
    )


def _abstract_batch(config: Config, lengths: Lengths, layout: Layout) -> Batch:
    B = config.train.batch_size
    C = B * config.data.group_size
    sharding = batch_sharding(layout.mesh)

    def array(*shape: int, dtype: Any = jnp.int32) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def tokens(rows: int, width: int) -> Tokens:
        return Tokens(array(rows, width), array(rows))

    explicit = lengths.explicit
    return Batch(
        query=tokens(B, lengths.query),
        documents=tokens(C, lengths.document),
        explicit=None if explicit is None else tokens(B, explicit),
        keyframes_BK=None if explicit is None else array(B, config.objective.num_thinking_steps),
        contrast_BC=array(B, C, dtype=jnp.bool_),
    )


def _compile(config: Config, layout: Layout, batch: Batch) -> dict[str, Any]:
    teacher, teacher_variables = None, None
    if config.objective.teacher is not None:
        retriever = load_retriever_config(config.objective.teacher)
        dtype = jnp.dtype(retriever.dtype)
        backbone = Backbone(retriever.backbone, dtype=dtype, param_dtype=dtype)
        teacher = FrozenTeacher(backbone, retriever.num_thinking_steps)
        teacher_variables = {"params": abstract_variables(backbone, layout.mesh, "params", dtype)}
    step = make_train_step(layout.backbone, config, layout.optimizer, layout.schedule, teacher)
    with jax.set_mesh(layout.mesh):
        programs = StepPrograms(jit_train_step(step, layout.abstract, layout.mesh))
        began = time.monotonic()
        try:
            compiled = programs.compile("", layout.abstract, batch, teacher_variables)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return {"does_not_fit": str(error).splitlines()[0]}
    memory: Any = compiled.memory_analysis()
    return {
        "compile_seconds": time.monotonic() - began,
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "peak_bytes": (
            # the CPU's compiler leaves its temporaries out of the peak
            memory.argument_size_in_bytes
            + memory.output_size_in_bytes
            + memory.temp_size_in_bytes
            - memory.alias_size_in_bytes
            if layout.platform == "cpu"
            # others count those that never live together once, and the sum of the parts is too much
            else memory.peak_memory_in_bytes
        ),
    }


def _widths(lengths: Lengths) -> str:
    explicit = "" if lengths.explicit is None else f", explicit {lengths.explicit}"
    return f"queries {lengths.query}, documents {lengths.document}{explicit}"


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB"
