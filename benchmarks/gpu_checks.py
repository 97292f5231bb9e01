"""Is it right on this device? The reference embeddings, and attention kernels against float32.

    python -m benchmarks.gpu_checks [--output FILE]

The reference embeddings are those of the shared folder `golden` (`LASER_GOLDEN` names another),
which tests/test_golden.py compares in full on the CPU; without it those rows are absent. In
bfloat16 they are compared loosely, since rounding through random weights is chaotic. The loss and
its gradient are compared with PyTorch's by `train_step`.

Attention of whole sequences and of a thought, forward and backward, is compared with XLA's in
float32 on the same bfloat16 inputs: a kernel may be off by twice what XLA's own bfloat16 attention
is off, and that by a hundredth. On a GPU this is cuDNN's check.

Exit status 1 where a check fails; the file is written all the same.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import measure
from benchmarks.measure import Report, Row
from benchmarks.workload import kernel_for
from laser_jax.config import AttentionKernel, ConfigError, Dtype, RetrieverConfig
from laser_jax.encoder import encode_all_steps
from laser_jax.hf.directory import read_backbone_config
from laser_jax.hf.reading import load_params
from laser_jax.modeling import attention

FOLDERS = ("../shared/golden", "shared/golden")
EMBEDDING: dict[Dtype, float] = {"float32": 1e-5, "bfloat16": 0.2}
"""Of a number of a unit vector in float32; of the distance of two unit vectors in bfloat16."""
HEADS = ((16, 8, 128), (32, 8, 64))
"""Query heads, key-value heads and head width: Qwen3-0.6B's and Llama-3.2-1B's."""
LENGTHS = (64, 128, 192, 222, 1024)
"""Multiples of 128 and others; cuDNN's backward pass has been wrong at 64 above one."""
ATTENTION = 2.0, 1e-3, 1e-2
"""How many times as far off as XLA's bfloat16 a kernel may be, and how far in any case; XLA's."""


def row(check: str, value: float, bound: float) -> Row:
    """NaN fails."""
    return {"check": check, "value": value, "bound": bound, "passed": bool(value <= bound)}


@dataclass(frozen=True)
class Check:
    """A program with its arguments, and what its outputs, host arrays, say."""

    program: Callable[..., Any]
    arguments: Sequence[Any]
    rows: Callable[[Any], Iterable[Row]]

    def compiled(self) -> Callable[[], Any]:
        """The program, ready to run. Which of a library's kernels is fastest does not matter."""
        untuned: dict[str, str | bool] = {"xla_gpu_autotune_level": "0"}
        compiled = jax.jit(self.program).lower(*self.arguments).compile(untuned)
        return functools.partial(compiled, *self.arguments)


# --- the reference numbers ---------------------------------------------------------------------


def golden_folder() -> Path | None:
    """The folder that LASER_GOLDEN names, or the first of FOLDERS that is there."""
    named = os.environ.get("LASER_GOLDEN")
    return next((f for f in map(Path, [named] if named else FOLDERS) if f.is_dir()), None)


def model_of(case: Path) -> Path:
    """The model of `encode_model1_ragged.npz` is `model1`."""
    return case.parent / case.stem.split("_")[1]


def embedding_check(case: Path, dtype: Dtype) -> Check:
    """Of a file `encode_*.npz`, a row for every K. One program gives the vectors of all of them."""
    golden, config = np.load(case), read_backbone_config(model_of(case))
    variables = {"params": load_params(model_of(case), config, dtype=jnp.dtype(dtype))}
    ids_BT, mask_BT = (golden[k].astype(np.int32) for k in ("input_ids", "attention_mask"))
    Ks = [int(K) for K in golden["Ks"]]
    kernel = kernel_for(config, dtype)
    program = functools.partial(
        encode_all_steps, config=RetrieverConfig(config, max(Ks), dtype=dtype), attention=kernel
    )

    def rows(vectors_BKD: Any) -> Iterator[Row]:
        for K in Ks:
            difference = vectors_BKD[:, K - 1] - golden[f"emb_K{K}"]
            off = np.abs(difference) if dtype == "float32" else np.linalg.norm(difference, axis=1)
            name = f"{case.stem}, K = {K}, {dtype}, {kernel}"
            yield row(name, float(off.max()), EMBEDDING[dtype])

    return Check(program, (variables, ids_BT, mask_BT), rows)


# --- attention ---------------------------------------------------------------------------------


def parts_of(
    attend: Callable[..., jax.Array], names: Iterable[str], weights: np.ndarray
) -> Callable[..., Any]:
    """Output and gradients of a random linear function of it, in float32."""

    def run(*inputs: jax.Array) -> dict[str, jax.Array]:
        def loss(*inputs: jax.Array) -> Any:
            with attention.exact_matmuls(inputs[0].dtype):
                out = attend(*inputs)
            return (out.astype(jnp.float32) * weights).sum(), out

        grads, out = jax.grad(loss, argnums=(*range(len(inputs)),), has_aux=True)(*inputs)
        named = {"forward": out} | {f"d{name}": g for name, g in zip(names, grads, strict=True)}
        return {name: array.astype(jnp.float32) for name, array in named.items()}

    return run


def against_float32(
    title: str,
    attentions: Mapping[str, Callable[..., jax.Array]],
    inputs: Mapping[str, np.ndarray],
    weights: np.ndarray,
) -> Check:
    """How far each is, in bfloat16, from `xla` in float32, relative in L2: output and gradients."""
    run = {name: parts_of(attend, inputs, weights) for name, attend in attentions.items()}

    def program(*half: jax.Array) -> Any:
        exact = run["xla"](*(x.astype(jnp.float32) for x in half))
        return exact, {name: parts(*half) for name, parts in run.items()}

    def rows(found: Any) -> Iterator[Row]:
        truth, got = found

        def off(name: str, part: str) -> float:
            difference = np.linalg.norm(got[name][part] - truth[part])
            return float(difference / np.linalg.norm(truth[part]))

        for name in got:
            for part in truth:
                bound = ATTENTION[0] * off("xla", part) + ATTENTION[1]
                bound = ATTENTION[2] if name == "xla" else bound  # it is no bound of itself
                yield row(f"{title}, {name}, {part}", off(name, part), bound)

    return Check(program, [x.astype(jnp.bfloat16) for x in inputs.values()], rows)


def drawn(seed: int, *shapes: tuple[int, ...]) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape, np.float32) for shape in shapes]


def reading_check(
    kernels: Sequence[AttentionKernel], heads: tuple[int, int, int], length: int
) -> Check:
    """The attention of whole sequences. For XLA's stands all of the scores at once, which is
    compiled in a fraction of the time of `causal_attention` in blocks."""
    N, G, H = heads
    visible_BP = jnp.tile(jnp.arange(1, length + 1), (4, 1))

    def attend(kernel: AttentionKernel) -> Callable[..., jax.Array]:
        if kernel == "xla":
            return lambda q, k, v: attention.counted_attention(
                q, attention.KeyValues(k, v), visible_BP
            )
        return lambda q, k, v: attention.causal_attention(q, attention.KeyValues(k, v), kernel)

    *inputs, weights = drawn(length, *((4, length, heads, H) for heads in (N, G, G, N)))
    named = dict(zip("qkv", inputs, strict=True))
    attentions = {kernel: attend(kernel) for kernel in kernels}
    return against_float32(f"reading, {N}/{G}×{H}, T = {length}", attentions, named, weights)


def thinking_check(
    kernels: Sequence[AttentionKernel], heads: tuple[int, int, int], length: int
) -> Check:
    """The attention of one position behind prompts of several lengths and two thoughts of four."""
    N, G, H = heads
    lengths_B = jnp.asarray([length, length // 2, 7, 1], jnp.int32)

    def attend(kernel: AttentionKernel) -> Callable[..., jax.Array]:
        def run(q: jax.Array, *others: jax.Array) -> jax.Array:
            prefix, suffix = attention.KeyValues(*others[:2]), attention.KeyValues(*others[2:])
            return attention.thinking_attention(
                q, attention.Past((prefix,), suffix), lengths_B, jnp.asarray(1), kernel
            )

        return run

    shapes = [(4, 1, N, H), *[(4, length, G, H)] * 2, *[(4, 4, G, H)] * 2, (4, 1, N, H)]
    *inputs, weights = drawn(length, *shapes)
    names = ["q", "k", "v", "k of thoughts", "v of thoughts"]
    named = dict(zip(names, inputs, strict=True))
    attentions = {kernel: attend(kernel) for kernel in kernels}
    return against_float32(f"thinking, {N}/{G}×{H}, T = {length}", attentions, named, weights)


def fill(options: argparse.Namespace, report: Report) -> None:
    """All checks; none of them raises."""
    heads, lengths = (((4, 2, 16),), (96,)) if options.quick else (HEADS, LENGTHS)
    folder = golden_folder()
    numbers: list[Check] = []
    if folder is None:
        report.notes.append("The reference numbers are not compared: no folder golden is here.")
    else:
        for case in sorted(folder.glob("encode_*.npz"))[: 1 if options.quick else None]:
            numbers += [embedding_check(case, dtype) for dtype in EMBEDDING]
    kernels: list[AttentionKernel] = ["xla"]
    try:
        platform = jax.default_backend()
        kernels.append(attention.choose_kernel("cudnn", platform, "bfloat16", heads[0][2])[0])
    except ConfigError as error:
        report.notes.append(f"cuDNN is not checked: {error}.")
    kernel_checks: list[Check] = []
    for shape in heads:
        kernel_checks += [reading_check(kernels, shape, length) for length in lengths]
        kernel_checks += [thinking_check(kernels, shape, length) for length in lengths[-2:]]
    for checks in (numbers, kernel_checks):
        # Compiling is most of the time. Nothing runs beside it: XLA 0.11 then aborted on a GPU.
        with ThreadPoolExecutor(options.threads) as pool:
            compiled = list(pool.map(Check.compiled, checks))
        for check, program in zip(checks, compiled, strict=True):
            report.rows += check.rows(jax.device_get(program()))
        if options.output is not None:
            report.write(options.output)  # what is known, should the next ones take too long
    failed = [r["check"] for r in report.rows if not r["passed"]]
    report.notes.append(f"{len(failed)} of {len(report.rows)} checks failed: {failed or 'none'}.")


COLUMNS = {
    "check": measure.value("check"),
    "off by": measure.value("value", ".2g"),
    "at most": measure.value("bound", ".2g"),
    "passed": lambda row: "yes" if row["passed"] else "NO",
}


def main(arguments: Sequence[str]) -> None:
    report = PROGRAM.main(arguments)
    sys.exit(0 if all(r["passed"] for r in report.rows) else 1)


def add_flags(parser: argparse.ArgumentParser) -> None:
    measure.add_numbers(parser, {"threads": (4, "that compile")})


PROGRAM = measure.Program("gpu_checks", __doc__, fill, COLUMNS, add_flags, repeats=None)

if __name__ == "__main__":
    main(sys.argv[1:])
