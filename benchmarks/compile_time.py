"""How long it takes until a program is ready: training step and encode, scanned and unscanned.

    python -m benchmarks.compile_time [--backbones NAME ...] [--output FILE]

Every measurement is made in a process of its own, twice: with an empty persistent cache (cold) and
with the one that the first process filled (warm). Scanned layers are compiled once and looped over;
unscanned ones are laid out one behind the other, which runs faster where nothing is trained. Shapes
alone are compiled, so that an 8B model needs no memory for its weights. Layers are traced anew in
both cases; the warm time is what the cache answers in.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from tqdm import tqdm

from benchmarks.measure import (
    BenchmarkError,
    Report,
    Spread,
    command_line,
    environment,
    paired_ratio,
    positive,
    ratio_cell,
    seconds_cell,
)
from benchmarks.train_step import (
    OPTIMIZER,
    STEPS,
    base_config,
    one_device_mesh,
)
from benchmarks.workload import (
    SHAPES,
    SMALL,
    TINY,
    TrainShape,
    abstract_variables,
    add_train_shape,
    make_backbone,
    random_batch,
    train_shape,
)
from laser_jax import encode
from laser_jax.config import Dtype, LoraConfig, RetrieverConfig
from laser_jax.modeling.backbone import unstack_layers
from laser_jax.step import (
    abstract_state,
    compile_train_step,
    learning_rate_schedule,
    make_optimizer,
    make_train_step,
)


@dataclass(frozen=True)
class Case:
    """A program to compile."""

    backbone: str
    program: str
    """"train_step" or "encode"."""
    scanned: bool
    dtype: Dtype
    shape: TrainShape
    """Of the training batch; `encode` reads its queries."""


def lower(case: Case) -> Any:
    """The traced and lowered program of a case."""
    config = SHAPES[case.backbone]
    if case.program == "encode":
        variables = abstract_variables(make_backbone(config, case.dtype, None))
        if not case.scanned:
            variables = jax.eval_shape(unstack_layers, variables)
        rows = jax.ShapeDtypeStruct((case.shape.queries, case.shape.query_tokens), jnp.int32)
        retriever = RetrieverConfig(config, case.shape.thinking_steps, dtype=case.dtype)
        return jax.jit(functools.partial(encode, config=retriever)).lower(variables, rows, rows)
    settings = base_config(case.shape, case.dtype, LoraConfig())
    backbone = make_backbone(config, case.dtype, settings.lora)
    backbone = backbone.clone(param_dtype=jnp.float32, scan_layers=case.scanned)
    optimizer, mesh = make_optimizer(OPTIMIZER, STEPS), one_device_mesh()
    step = make_train_step(
        backbone, settings, optimizer, learning_rate_schedule(OPTIMIZER, STEPS)
    )
    abstract = abstract_state(backbone, optimizer, mesh, jnp.dtype(case.dtype))
    batch = jax.eval_shape(lambda: random_batch_of(case))
    with jax.set_mesh(mesh):
        jitted: Any = compile_train_step(step, abstract, mesh)
        return jitted.lower(abstract, batch, None)


def random_batch_of(case: Case) -> Any:
    """The training batch of a case, as arrays of jax."""
    return jax.tree.map(jnp.asarray, random_batch(case.shape, SHAPES[case.backbone].vocab_size))


def seconds_to_ready(case: Case, cache: Path) -> tuple[float, float, bool]:
    """Seconds of tracing and of compiling a case, and whether a persistent cache held it. Runs in a
    process of its own."""
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    jax.jit(lambda x: x + 1).lower(jnp.zeros(3)).compile()  # starts the backend
    before = {path.name for path in cache.iterdir()}
    began = time.perf_counter()
    lowered = lower(case)
    traced = time.perf_counter()
    lowered.compile()
    compiled = time.perf_counter()
    found = not any("train_step" in path.name for path in cache.iterdir()) and before is None
    return traced - began, compiled - traced, found


def main(arguments: Sequence[str]) -> None:
    """The command line."""


if __name__ == "__main__":
    main(sys.argv[1:])
