"""Is it right on this device? The reference numbers, and the attention kernels against float32.

    python -m benchmarks.gpu_checks [--golden FOLDER] [--output FILE]

The reference numbers are those of the shared folder `golden` (`LASER_GOLDEN` names another), which
tests/test_golden.py compares in full on the CPU; without it those rows are absent. Embeddings are
compared in float32, and in bfloat16 loosely, since rounding through random weights is chaotic; the
training loss and the norm of its gradient in float32.

Attention, forward and backward, is compared with XLA's in float32 on the same bfloat16 inputs: a
kernel may be off by twice what XLA's own bfloat16 attention is off. On a GPU this is cuDNN's check.

Exit status 1 where a check fails; the file is written all the same.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.measure import Report, command_line, environment
from laser_jax import encode
from laser_jax.alignment import keyframe_positions, token_segment_ends
from laser_jax.config import (
    AttentionKernel,
    ConfigError,
    Dtype,
    LossWeights,
    ObjectiveConfig,
    RetrieverConfig,
)
from laser_jax.data.pipeline import Batch, Tokens
from laser_jax.data.tokenization import right_pad
from laser_jax.hf import load_params, read_backbone_config
from laser_jax.modeling.attention import (
    KeyValues,
    causal_attention,
    choose_kernel,
    exact_matmuls,
)
from laser_jax.modeling.backbone import Backbone
from laser_jax.step import objective_terms

FOLDERS = ("../shared/golden", "shared/golden")
EMBEDDING = {"float32": 1e-5, "bfloat16": 0.2}
"""Of a number of a unit vector in float32; of the distance of two unit vectors in bfloat16."""
LOSS, GRADIENT = 1e-4, 1e-3
"""Relative."""
HEADS = ((16, 8, 128), (32, 8, 64))
"""Query heads, key-value heads and head width: Qwen3-0.6B's and Llama-3.2-1B's."""
LENGTHS = (64, 128, 192, 222, 512, 1024)
"""Multiples of 128 and others; cuDNN's backward pass has been wrong at 64 above one."""
ATTENTION = 2.0, 1e-3
"""How many times as far off as XLA's bfloat16 a kernel may be, and how far in any case."""

Row = dict[str, Any]


def row(check: str, value: float, bound: float) -> Row:
    """NaN fails."""
    return {"check": check, "value": value, "bound": bound, "passed": bool(value <= bound)}


# --- the reference numbers ---------------------------------------------------------------------


def golden_folder(given: Path | None) -> Path | None:
    """The folder that is given, that LASER_GOLDEN names, or the first of FOLDERS that is there."""
    named = [given or os.environ.get("LASER_GOLDEN")]
    candidates = [Path(name) for name in (named if named[0] else FOLDERS) if name]
    return next((folder for folder in candidates if folder.is_dir()), None)


def model_of(case: Path) -> Path:
    """The model of `encode_model1_ragged.npz` is `model1`."""
    return case.parent / case.stem.split("_")[1]


def embedding_rows(case: Path, dtype: Dtype, most: int | None) -> Iterator[Row]:
    """Of a file `encode_*.npz`, a row for every K, or for so many."""
    golden, config = np.load(case), read_backbone_config(model_of(case))
    variables = {"params": load_params(model_of(case), config, dtype=jnp.dtype(dtype))}
    ids_BT, mask_BT = (golden[k].astype(np.int32) for k in ("input_ids", "attention_mask"))
    for K in map(int, golden["Ks"][:most]):
        program = functools.partial(encode, config=RetrieverConfig(config, K, dtype=dtype))
        difference = np.asarray(jax.jit(program)(variables, ids_BT, mask_BT)) - golden[f"emb_K{K}"]
        off = np.abs(difference) if dtype == "float32" else np.linalg.norm(difference, axis=1)
        yield row(f"{case.stem}, K = {K}, {dtype}", float(off.max()), EMBEDDING[dtype])


def batch_of(case: Any) -> Batch:
    """The training batch of a file `train_*.npz`; EOS is behind the collator's tokens."""

    def rows(part: str) -> list[list[int]]:
        pairs = zip(case[f"{part}_ids"], case[f"{part}_mask"], strict=True)
        return [ids[mask == 1].tolist() for ids, mask in pairs]

    explicit, K = rows("r"), int(case["K"])
    padded = case["r_ids"].shape[1]
    keyframes = []
    for ids, start in zip(explicit, case["cot_start"], strict=True):
        ends = token_segment_ends(ids, int(start) - (padded - len(ids)), int(case["newline_id"]))
        keyframes.append(keyframe_positions(ends, len(ids), K, "official"))
    query, documents, read = (
        Tokens(*right_pad(part, 0, 8))
        for part in (rows("q"), rows("p"), [[*ids, int(case["eos_id"])] for ids in explicit])
    )
    contrast_BC = np.ones((len(query.ids_BT), len(documents.ids_BT)), np.bool_)
    return Batch(query, documents, read, np.stack(keyframes), contrast_BC)


def training_rows(case: Path) -> Iterator[Row]:
    """Of a file `train_*.npz`: the loss, its terms and the norm of the whole gradient."""
    golden, config = np.load(case), read_backbone_config(model_of(case))
    params = load_params(model_of(case), config, dtype="float32")
    objective = ObjectiveConfig(
        num_thinking_steps=int(golden["K"]),
        weights=LossWeights(
            output=float(golden["kl_weight"]), trajectory=float(golden["latent_weight"])
        ),
        temperature=float(golden["temperature"]),
        output_temperature=float(golden["temperature"]),
        trajectory_temperature=float(golden["latent_temperature"]),
        keyframes="official",
        views="parity",
    )
    batch = batch_of(golden)

    @jax.jit
    def gradient(params: Any) -> Any:
        def loss(params: Any) -> Any:
            terms = objective_terms(
                Backbone(config), {"params": params}, batch, objective, jnp.ones(())
            )
            return terms["loss"], terms

        grads, terms = jax.grad(loss, has_aux=True)(params)
        return optax.tree.norm(grads), terms

    norm, terms = gradient(params)
    names = {"loss": "loss", "latent": "loss_q", "output": "loss_kl", "explicit": "loss_teacher"}
    for ours, theirs in (names | {"trajectory": "loss_latent"}).items():
        wanted = float(golden[theirs])
        off = abs(float(terms[ours]) - wanted) / max(abs(wanted), 0.05)
        yield row(f"{case.stem}, {ours}", off, LOSS)
    wanted = float(np.linalg.norm(golden["grad_norms"]))
    yield row(f"{case.stem}, norm of the gradient", abs(float(norm) / wanted - 1), GRADIENT)


# --- attention ---------------------------------------------------------------------------------


def attention_parts(kernel: AttentionKernel, inputs: Any) -> dict[str, jax.Array]:
    """Output and gradients of a random linear function of it, in float32."""
    *inputs, weights = inputs

    @jax.jit
    def run(q: jax.Array, k: jax.Array, v: jax.Array) -> dict[str, jax.Array]:
        def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
            with exact_matmuls(q.dtype):
                out = causal_attention(q, KeyValues(k, v), kernel)
            return (out.astype(jnp.float32) * weights).sum(), out

        grads, out = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)
        named = {"forward": out} | dict(zip(("dq", "dk", "dv"), grads, strict=True))
        return {name: array.astype(jnp.float32) for name, array in named.items()}

    return run(*inputs)


def attention_rows(
    kernels: Sequence[AttentionKernel], heads: tuple[int, int, int], length: int
) -> Iterator[Row]:
    """How far each kernel is from float32, forward and backward, relative in L2."""
    N, G, H = heads
    keys = jax.random.split(jax.random.key(length), 4)
    shapes = [(4, length, heads, H) for heads in (N, G, G, N)]
    drawn = [
        jax.random.normal(k, shape, jnp.float32) for k, shape in zip(keys, shapes, strict=True)
    ]
    half = [x.astype(jnp.bfloat16) for x in drawn[:3]]
    truth = attention_parts("xla", [*(x.astype(jnp.float32) for x in half), drawn[3]])

    def off(kernel: AttentionKernel) -> dict[str, float]:
        got = attention_parts(kernel, [*half, drawn[3]])
        norm = jnp.linalg.norm
        return {name: float(norm(got[name] - truth[name]) / norm(truth[name])) for name in truth}

    xla = off("xla")
    for kernel in kernels:
        for part, value in (xla if kernel == "xla" else off(kernel)).items():
            bound = ATTENTION[0] * xla[part] + ATTENTION[1]
            yield row(f"attention {kernel}, {N}/{G}×{H}, T = {length}, {part}", value, bound)


def measure(options: argparse.Namespace, arguments: Sequence[str]) -> Report:
    """All checks; none of them raises."""
    heads, lengths = (((4, 2, 16),), (96,)) if options.quick else (HEADS, LENGTHS)
    report = Report("gpu_checks", arguments, {"heads": heads, "lengths": lengths}, environment())
    folder = golden_folder(options.golden)
    if folder is None:
        report.notes.append("The reference numbers are not compared: no folder golden is here.")
    else:
        most = 1 if options.quick else None
        for case in sorted(folder.glob("encode_*.npz"))[:most]:
            for dtype in ("float32", "bfloat16"):
                report.rows += embedding_rows(case, dtype, most)
        for case in sorted(folder.glob("train_*.npz")):
            report.rows += training_rows(case)
    kernels: list[AttentionKernel] = ["xla"]
    try:
        platform = jax.default_backend()
        kernels.append(choose_kernel("cudnn", platform, "bfloat16", heads[0][2])[0])
    except ConfigError as error:
        report.notes.append(f"cuDNN is not checked: {error}.")
    for shape in heads:
        for length in lengths:
            report.rows += attention_rows(kernels, shape, length)
    failed = [r["check"] for r in report.rows if not r["passed"]]
    report.notes.append(f"{len(failed)} of {len(report.rows)} checks failed: {failed or 'none'}.")
    return report


COLUMNS = {
    "check": lambda row: row["check"],
    "off by": lambda row: f"{row['value']:.2g}",
    "at most": lambda row: f"{row['bound']:.2g}",
    "passed": lambda row: "yes" if row["passed"] else "NO",
}


def main(arguments: Sequence[str]) -> None:
    """The command line."""
    parser = command_line("gpu_checks", __doc__)
    parser.add_argument("--golden", type=Path, help=f"default {' or '.join(FOLDERS)}")
    options = parser.parse_args(arguments)
    report = measure(options, arguments)
    report.finish(COLUMNS, options.output)
    sys.exit(0 if all(r["passed"] for r in report.rows) else 1)


if __name__ == "__main__":
    main(sys.argv[1:])
