"""One training step, ours in its variants and PyTorch's: time, compile time, work and memory.

    python -m benchmarks.train_step [--full] [--backbone NAME] [--output FILE]

All contenders take an AdamW step of the four-term loss on the same batch from the same weights, on
one device, and every one that claims to compute the same function is checked before it is timed:
losses and gradient norm must be those of the first, `fast` unless `--only` leaves it out, or the
program stops. Ours:

fast             query and chain of thought in one pass, queries and documents think together
parity           a pass for each view
gradcache / n    n micro-batches, the loss over the whole batch, each read twice
plain / n        n micro-batches, each with a loss over its own documents: another function
remat dots, full the backward pass recomputes
xla attention    with XLA's attention kernel, where that is not what `auto` takes

PyTorch's, where it is installed: see benchmarks/torch_reference.py. The contenders share their
device one at a time; our programs hand one training state on, so that it is held once.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from benchmarks import encoders, kernels, measure, workload
from benchmarks.flops import matmul_flops
from benchmarks.measure import BenchmarkError, Report, Row, Run, positive, timing_fields
from benchmarks.workload import shape_of, train_shape
from laser_jax.batch import Batch
from laser_jax.config import (
    Config,
    DataConfig,
    Dtype,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ScratchConfig,
    TrainConfig,
)
from laser_jax.modeling.backbone import Backbone
from laser_jax.sharding import batch_sharding, make_mesh
from laser_jax.step import TrainState, make_train_step
from laser_jax.train.model import build_backbone
from laser_jax.train.state import (
    abstract_state,
    init_state,
    jit_train_step,
    learning_rate_schedule,
    make_optimizer,
)

TERMS: tuple[str, ...] = ("loss", "latent", "explicit", "output", "trajectory")
# Relative. In bfloat16 a score is good to 0.004, which a temperature of 0.02 multiplies by 50.
LOSS_TOLERANCE: dict[Dtype, float] = {"float32": 1e-4, "bfloat16": 0.2}
GRADIENT_TOLERANCE: dict[Dtype, float] = {"float32": 1e-3, "bfloat16": 0.5}
OPTIMIZER = OptimizerConfig(warmup_ratio=0.0, schedule="constant")
STEPS = 1_000_000
"""Of the learning-rate schedule, which is constant."""

Metrics = Mapping[str, float]

# --- our contenders --------------------------------------------------------------------------


@dataclass(frozen=True)
class Setup:
    """What contenders share: weights and a batch, on the host."""

    backbone: Backbone
    abstract: TrainState
    start: TrainState
    batch: Batch
    mesh: Mesh


def base_config(options: argparse.Namespace) -> Config:
    """The settings of `fast`. Of `model` the step takes kernel and remat alone."""
    shape, dtype = train_shape(options), options.dtype
    kernel = workload.kernel_for(shape_of(options), dtype)
    told = {"dtype": dtype, "param_dtype": dtype, "remat": options.every_remat}
    return Config(
        ModelConfig(scratch=ScratchConfig(), attention=kernel, **told),
        DataConfig(group_size=shape.documents_per_query),
        lora=None if options.full else LoraConfig(rank=64, alpha=32),
        objective=ObjectiveConfig(num_thinking_steps=shape.thinking_steps, views="fast"),
        optimizer=OPTIMIZER,
        train=TrainConfig(batch_size=shape.queries),
    )


def set_up(options: argparse.Namespace) -> tuple[Setup, Config]:
    """Random weights, adapters that change something, a random batch, and the settings of `fast`.
    The mesh is over the first device, as PyTorch has one."""
    config, mesh = base_config(options), make_mesh(MeshConfig(), jax.devices()[:1])
    shape = shape_of(options)
    backbone, _ = build_backbone(config.model, shape, jax.default_backend(), config.lora)
    optimizer = make_optimizer(OPTIMIZER, STEPS)
    abstract = abstract_state(backbone, optimizer, mesh, jnp.dtype(options.dtype))
    with jax.set_mesh(mesh):
        start = jax.device_get(init_state(backbone, optimizer, abstract, 0, None))
    if config.lora is not None:
        start = replace(start, trained=nudged(start.trained))
    batch = workload.random_batch(train_shape(options), shape.vocab_size)
    return Setup(backbone, abstract, start, batch, mesh), config


def nudged(adapters: Any) -> Any:
    """Adapters that change something: a fresh one has B = 0, and so no gradient reaches its A."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda a: a + rng.normal(0, 0.02, a.shape).astype(a.dtype), adapters)


def variants(base: Config, options: argparse.Namespace) -> dict[str, Config]:
    """Our contenders by name: all, or those in `options.only`.

    Raises:
        BenchmarkError: there is no contender of a name, or the queries do not divide into its
            micro-batches.
    """
    queries = base.train.batch_size
    made: dict[str, tuple[str, dict[str, Any]]] = {
        "fast": ("train", {}),
        "parity": ("objective", {"views": "parity"}),
        **{
            f"{way} / {n}": ("train", {"accumulation": way, "micro_batch_size": queries // n})
            for way in ("gradcache", "plain")
            for n in getattr(options, way)
        },
        **{f"remat {remat}": ("model", {"remat": remat}) for remat in options.remat},
    }
    if base.model.attention != "xla":
        made["xla attention"] = ("model", {"attention": "xla"})
    only = list(made) if options.only is None else options.only
    if unknown := sorted(set(only) - made.keys()):
        raise BenchmarkError(f"--only {unknown}: the contenders are {list(made)}")
    for name in only:
        parts = int(name.partition(" / ")[2] or 1)
        if queries % parts:
            raise BenchmarkError(f"{queries} queries do not divide into {parts} micro-batches")
    return {
        name: replace(base, **{part: replace(getattr(base, part), **changes)})
        for name, (part, changes) in made.items()
        if name in only
    }


def same_function(config: Config) -> bool:
    """Whether a variant computes the loss of `fast`."""
    return config.train.accumulation != "plain" or config.train.num_micro_batches == 1


def compile_variant(config: Config, setup: Setup) -> tuple[Any, dict[str, Any]]:
    """The step of `config`, ready to run, and what its making took; within its mesh."""
    abstract, batch = setup.abstract, setup.batch
    attention: Any = config.model.attention
    step = make_train_step(
        setup.backbone.clone(remat=config.model.remat, attention=attention),
        config,
        make_optimizer(config.optimizer, STEPS),
        learning_rate_schedule(config.optimizer, STEPS),
    )
    jitted = jit_train_step(step, abstract, setup.mesh)
    began = time.perf_counter()
    program_traced = jitted.trace(abstract, batch, None)
    lowered = program_traced.lower()
    traced = time.perf_counter()
    program = lowered.compile()
    compiled = time.perf_counter()
    return program, {
        "trace_seconds": traced - began,
        "compile_seconds": compiled - traced,
        "matmul_flops": matmul_flops(program_traced.jaxpr.jaxpr),
        "temp_bytes": program.memory_analysis().temp_size_in_bytes,
    }


class OurTraining:
    """The training state that our programs hand on, and the batch that all of them read."""

    def __init__(self, setup: Setup):
        self._start = setup.start
        self._layout = jax.tree.map(lambda a: a.sharding, setup.abstract)
        self._batch = jax.device_put(setup.batch, batch_sharding(setup.mesh))
        self._state: TrainState | None = None

    def restart(self) -> None:
        """Back to the first weights."""
        self._state = None  # or two of them would be held
        self._state = jax.device_put(self._start, self._layout)

    def run(self, program: Any) -> dict[str, jax.Array]:
        """One step."""
        self._state, metrics = program(self._state, self._batch, None)
        return metrics


# --- agreement, and PyTorch's ----------------------------------------------------------------


def require_agreement(name: str, got: Metrics, wanted: Metrics, dtype: Dtype) -> None:
    """Raises a BenchmarkError where a contender does not compute what the first computes."""
    losses = dict.fromkeys(TERMS, LOSS_TOLERANCE[dtype])
    tolerances = losses | {"grad_norm": GRADIENT_TOLERANCE[dtype]}
    wrong = [
        f"{term} {got[term]:.8g} and not {wanted[term]:.8g}"
        for term, tolerance in tolerances.items()
        if not np.isclose(got[term], wanted[term], rtol=tolerance, atol=0)
    ]
    if wrong:
        raise BenchmarkError(f"{name} computes another function than the first: {'; '.join(wrong)}")


def torch_contenders(setup: Setup, config: Config, names: Sequence[str]) -> dict[str, Run]:
    """PyTorch's contenders of these names; each call takes a step and returns its metrics."""
    if not names:
        return {}
    from benchmarks.torch_reference import TorchTraining, load

    models = load(names, setup.start.variables, setup.backbone, config.model.dtype, train=True)
    return {
        transcription.name: TorchTraining(
            transcription, model, setup.batch, config.objective, OPTIMIZER
        )
        for transcription, model in models.items()
    }


def torch_names(options: argparse.Namespace) -> tuple[Sequence[str], list[str]]:
    """As `encoders.torch_names`; training all weights is transcribed in float32 alone."""
    if options.full and options.dtype != "float32":
        return (), ["PyTorch is not measured: it trains all weights in float32 alone."]
    return encoders.torch_names(options)


# --- the program -----------------------------------------------------------------------------


def fill(options: argparse.Namespace, report: Report) -> None:
    """Checks and times the contenders.

    Raises:
        BenchmarkError: a contender computes another function than the first.
    """
    jax.config.update("jax_enable_compilation_cache", False)  # the compile times are to be real
    configs = variants(base_config(options), options)
    base = min(configs, key=lambda name: not same_function(configs[name]))
    setup, fast = set_up(options)
    report.settings["attention"] = fast.model.attention
    training = OurTraining(setup)
    with jax.set_mesh(setup.mesh):
        contenders: dict[str, Run] = {}
        facts: dict[str, dict[str, Any]] = {}
        for name, config in configs.items():
            program, facts[name] = compile_variant(config, setup)
            contenders[name] = functools.partial(training.run, program)
        names, notes = torch_names(options)
        report.notes += notes
        contenders |= torch_contenders(setup, fast, names)
        first: dict[str, dict[str, float]] = {}
        for name, run in contenders.items():
            if name in configs:
                training.restart()
            first[name] = {key: float(number) for key, number in run().items()}
            if name not in configs or same_function(configs[name]):
                require_agreement(name, first[name], first[base], options.dtype)
        times = measure.time_alternating(contenders, repeats=options.repeats)
        for name in configs if options.profile else ():
            facts[name]["kernels"] = kernels.profiled(contenders[name])
    for name in contenders:
        row: Row = {"contender": name} | timing_fields(times, name, base)
        row["queries_per_second"] = options.queries / row["seconds"]["median"]
        report.rows.append(row | facts.get(name, {}) | {"first_step": first[name]})


COLUMNS = {
    "step": measure.value("contender"),
    "time (quartiles)": measure.seconds(),
    "× the first (quartiles)": measure.ratio(),
    "queries/s": measure.value("queries_per_second", ".2f"),
    "trace, s": measure.value("trace_seconds", ".1f"),
    "compile, s": measure.value("compile_seconds", ".1f"),
    "matmul GFLOP": measure.value("matmul_flops", ",.1f", 1e9),
    "temporary MiB": measure.value("temp_bytes", ",.0f", 2**20),
    "kernels": kernels.told,
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    workload.add_contenders(parser)
    workload.add_train_shape(parser)
    for name, default in (("gradcache", [2, 4, 8]), ("plain", [4])):
        text = f"numbers of micro-batches; default {' '.join(map(str, default))}"
        parser.add_argument(f"--{name}", type=positive, nargs="*", default=default, help=text)
    remats = ("dots", "full")
    parser.add_argument("--remat", choices=remats, nargs="*", default=[*remats])
    parser.add_argument("--every_remat", choices=remats, default="none", help="of all contenders")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="of ours these")
    parser.add_argument("--profile", action="store_true", help="the kernels of ours, by kind")


QUICK = {"backbone": workload.TINY, **vars(workload.TINY_TRAIN_SHAPE)}
QUICK |= {"gradcache": [2], "plain": [2], "remat": []}
PROGRAM = measure.Program("train_step", __doc__, fill, COLUMNS, add_flags, QUICK)

if __name__ == "__main__":
    PROGRAM.main(sys.argv[1:])
