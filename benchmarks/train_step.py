"""One training step, ours in its variants and PyTorch's: time, compile time, work and memory.

    python -m benchmarks.train_step [--full] [--backbone NAME] [--output FILE]

All contenders take an AdamW step of the four-term loss on the same batch from the same weights, on
one device, and every one that claims to compute the same function is checked before it is timed:
losses and gradient norm must be those of `fast`, or the program stops. Ours:

fast             query and chain of thought in one pass, queries and documents think together
parity           a pass for each view
gradcache / n    n micro-batches, the loss over the whole batch, each read twice
plain / n        n micro-batches, each with a loss over its own documents: another function
remat dots, full the backward pass recomputes
xla attention    with XLA's attention kernel, where that is not what `auto` takes
unrolled         layers laid out one behind the other (--unrolled; slow to compile)

PyTorch's, where it is installed: see benchmarks/torch_reference.py. The contenders share their
device one at a time; our programs hand one training state on, so that it is held once.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from benchmarks.flops import matmul_flops
from benchmarks.measure import (
    BenchmarkError,
    Report,
    Run,
    command_line,
    environment,
    positive,
    ratio_cell,
    seconds_cell,
    time_alternating,
    timing_fields,
    torch_threads,
    torch_unusable,
)
from benchmarks.workload import (
    SHAPES,
    TINY,
    TrainShape,
    add_backbone,
    add_contenders,
    add_torch_compile,
    add_train_shape,
    kernel_for,
    make_backbone,
    random_batch,
    train_shape,
)
from laser_jax.config import (
    AttentionKernel,
    BackboneConfig,
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
    as_dict,
)
from laser_jax.data.pipeline import Batch
from laser_jax.modeling.backbone import Backbone
from laser_jax.sharding import batch_sharding, make_mesh
from laser_jax.step import (
    TrainState,
    abstract_state,
    init_state,
    jit_train_step,
    learning_rate_schedule,
    make_optimizer,
    make_train_step,
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


def base_config(
    shape: TrainShape, dtype: Dtype, lora: LoraConfig | None, attention: AttentionKernel = "xla"
) -> Config:
    """The settings of `fast`. Of `model` the step takes kernel and remat; its backbone is made
    apart."""
    return Config(
        ModelConfig(scratch=ScratchConfig(), dtype=dtype, param_dtype=dtype, attention=attention),
        DataConfig(group_size=shape.documents_per_query),
        lora=lora,
        objective=ObjectiveConfig(num_thinking_steps=shape.thinking_steps, views="fast"),
        optimizer=OPTIMIZER,
        train=TrainConfig(batch_size=shape.queries),
    )


def variants(
    base: Config,
    gradcache: Sequence[int],
    plain: Sequence[int],
    remat: Sequence[Any],
    *,
    unrolled: bool = False,
    only: Sequence[str] | None = None,
) -> dict[str, Config]:
    """Our contenders by name: `fast`, with which all others are compared, and those in `only`.

    Raises:
        BenchmarkError: there is no contender of a name, or the queries do not divide into its
            micro-batches.
    """

    def chunked(accumulation: Any, parts: int) -> Config:
        if base.train.batch_size % parts:
            raise BenchmarkError(
                f"{base.train.batch_size} queries do not divide into {parts} micro-batches"
            )
        size = base.train.batch_size // parts
        return replace(
            base, train=replace(base.train, micro_batch_size=size, accumulation=accumulation)
        )

    def with_model(**changes: Any) -> Config:
        return replace(base, model=replace(base.model, **changes))

    made: dict[str, Callable[[], Config]] = {
        "fast": lambda: base,
        "parity": lambda: replace(base, objective=replace(base.objective, views="parity")),
        **{f"gradcache / {n}": functools.partial(chunked, "gradcache", n) for n in gradcache},
        **{f"plain / {n}": functools.partial(chunked, "plain", n) for n in plain},
        **{f"remat {r}": functools.partial(with_model, remat=r) for r in remat},
    }
    if base.model.attention != "xla":
        made["xla attention"] = functools.partial(with_model, attention="xla")
    if unrolled:
        made["unrolled"] = functools.partial(with_model, unroll_layers=True)
    if only is not None and (unknown := set(only) - set(made)):
        raise BenchmarkError(f"--only {sorted(unknown)}: the contenders are {list(made)}")
    return {name: make() for name, make in made.items() if only is None or name in {"fast", *only}}


def same_function(config: Config) -> bool:
    """Whether a variant computes the loss of `fast`."""
    return config.train.accumulation != "plain" or config.train.num_micro_batches == 1


def one_device_mesh() -> Mesh:
    """A mesh over the first device, as PyTorch has one."""
    return make_mesh(MeshConfig(), jax.devices()[:1])


@dataclass(frozen=True)
class Compiled:
    """A step that is ready to run, and what its making took."""

    program: Any
    facts: dict[str, Any]


@dataclass(frozen=True)
class Setup:
    """What contenders share: weights and a batch, on the host."""

    backbone: Backbone
    abstract: TrainState
    start: TrainState
    batch: Batch
    mesh: Mesh


def set_up(
    config: BackboneConfig, shape: TrainShape, dtype: Dtype, lora: LoraConfig | None
) -> Setup:
    """Random weights, adapters that change something, and a random batch."""
    mesh = one_device_mesh()
    # what is trained is float32, and `abstract_state` sees to the storage dtype of a frozen base
    backbone = make_backbone(config, dtype, lora).clone(param_dtype=jnp.float32, reverse_only=True)
    optimizer = make_optimizer(OPTIMIZER, STEPS)
    abstract = abstract_state(backbone, optimizer, mesh, jnp.dtype(dtype))
    with jax.set_mesh(mesh):
        start = jax.device_get(init_state(backbone, optimizer, abstract, 0, None))
    if lora is not None:
        start = replace(start, trained=nudged(start.trained))
    return Setup(backbone, abstract, start, random_batch(shape, config.vocab_size), mesh)


def compile_variant(config: Config, setup: Setup) -> Compiled:
    """Traces and compiles the step of `config`, within its mesh."""
    optimizer = make_optimizer(config.optimizer, STEPS)
    abstract, batch = setup.abstract, setup.batch
    attention: Any = config.model.attention
    step = make_train_step(
        setup.backbone.clone(
            remat=config.model.remat,
            attention=attention,
            unroll_layers=config.model.unroll_layers,
        ),
        config,
        optimizer,
        learning_rate_schedule(config.optimizer, STEPS),
    )
    jitted = jit_train_step(step, abstract, setup.mesh)
    began = time.perf_counter()
    lowered = jitted.lower(abstract, batch, None)
    traced = time.perf_counter()
    program = lowered.compile()
    compiled = time.perf_counter()
    cost, memory = program.cost_analysis() or {}, program.memory_analysis()
    return Compiled(
        program,
        {
            "trace_seconds": traced - began,
            "compile_seconds": compiled - traced,
            "matmul_flops": matmul_flops(step, abstract, batch, None),
            **{
                f"xla_{name}_loops_once": cost[key]
                for name, key in (("flops", "flops"), ("bytes", "bytes accessed"))
                if key in cost
            },
            "temp_bytes": memory.temp_size_in_bytes,
            "argument_bytes": memory.argument_size_in_bytes,
        },
    )


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


# --- agreement -------------------------------------------------------------------------------


def require_agreement(name: str, got: Metrics, wanted: Metrics, dtype: Dtype) -> None:
    """Raises a BenchmarkError where a contender does not compute what `fast` computes."""
    losses = dict.fromkeys(TERMS, LOSS_TOLERANCE[dtype])
    tolerances = losses | {"grad_norm": GRADIENT_TOLERANCE[dtype]}
    wrong = [
        f"{term} {got[term]:.8g} and not {wanted[term]:.8g}"
        for term, tolerance in tolerances.items()
        if not np.isclose(got[term], wanted[term], rtol=tolerance, atol=0)
    ]
    if wrong:
        raise BenchmarkError(f"{name} computes another function than fast: {'; '.join(wrong)}")


# --- the program -----------------------------------------------------------------------------


def torch_contenders(
    setup: Setup,
    dtype: Dtype,
    objective: ObjectiveConfig,
    names: Sequence[str] | None = None,
    *,
    torch_compile: bool = False,
) -> dict[str, Run]:
    """The transcriptions as callables that take a step and return its metrics.

    Args:
        names: which; None takes all.
    """
    from benchmarks.torch_reference import TorchTraining, exported, load, transcriptions

    backbone = setup.backbone
    with exported(setup.start.variables, backbone.config, backbone.lora, dtype) as export:
        return {
            transcription.name: TorchTraining(
                transcription,
                load(export, transcription, train=True),
                setup.batch,
                objective,
                OPTIMIZER,
            )
            for transcription in transcriptions(torch_compile=torch_compile)
            if names is None or transcription.name in names
        }


def why_no_torch(dtype: Dtype, lora: LoraConfig | None) -> str | None:
    """Why the PyTorch contenders are absent, None where they are not."""
    if lora is None and dtype != "float32":
        return "full fine-tuning is transcribed in float32 alone"
    return torch_unusable()


def measure(options: argparse.Namespace, arguments: Sequence[str]) -> Report:
    """Checks and times the contenders.

    Raises:
        BenchmarkError: a contender computes another function than `fast`.
    """
    shape = train_shape(options)
    backbone_config = SHAPES[TINY if options.quick else options.backbone]
    gradcache, plain, remat = options.gradcache, options.plain, options.remat
    if options.quick:
        gradcache, plain, remat = [2], [2], []
    lora = None if options.full else LoraConfig(rank=options.lora_rank, alpha=options.lora_rank / 2)
    kernel = kernel_for(options.attention, backbone_config, options.dtype)
    report = Report(
        "train_step",
        arguments,
        {
            "backbone": as_dict(backbone_config),
            "shape": vars(shape),
            "lora": None if lora is None else as_dict(lora),
            "dtype": options.dtype,
            "attention": kernel,
            "optimizer": as_dict(OPTIMIZER),
            "repeats": options.repeats,
            "torch_threads": torch_threads(),
        },
        environment(),
    )
    base = base_config(shape, options.dtype, lora, kernel)
    configs = variants(base, gradcache, plain, remat, unrolled=options.unrolled, only=options.only)
    setup = set_up(backbone_config, shape, options.dtype, lora)
    training = OurTraining(setup)
    with jax.set_mesh(setup.mesh):
        contenders: dict[str, Run] = {}
        facts: dict[str, dict[str, Any]] = {}
        metrics: dict[str, dict[str, float]] = {}
        for name, config in configs.items():
            compiled = compile_variant(config, setup)
            facts[name] = compiled.facts
            contenders[name] = functools.partial(training.run, compiled.program)
        why_not = "--no_torch" if options.no_torch else why_no_torch(options.dtype, lora)
        if why_not is None:
            contenders |= torch_contenders(
                setup, options.dtype, base.objective, torch_compile=options.torch_compile
            )
        else:
            report.notes.append(f"PyTorch is not measured: {why_not}.")
        for name, run in contenders.items():
            if name in configs:
                training.restart()
            metrics[name] = {key: float(value) for key, value in run().items()}
            if name not in configs or same_function(configs[name]):
                require_agreement(name, metrics[name], metrics["fast"], options.dtype)
        times = time_alternating(contenders, repeats=options.repeats)
    for name in contenders:
        report.rows.append(
            {"contender": name}
            | timing_fields(times, name, base="fast")
            | {"queries_per_second": shape.queries / float(np.median(times[name]))}
            | facts.get(name, {})
            | {"first_step": metrics[name]}
        )
    return report


def nudged(adapters: Any) -> Any:
    """Adapters that change something: a fresh one has B = 0, and so no gradient reaches its A."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda a: a + rng.normal(0, 0.02, a.shape).astype(a.dtype), adapters)


def _cell(keys: Sequence[str], unit: float, digits: int = 1) -> Callable[[dict[str, Any]], str]:
    """The text of some numbers of a row in a unit; empty where the row has none of them."""

    def cell(row: dict[str, Any]) -> str:
        return " / ".join(f"{row[key] / unit:,.{digits}f}" for key in keys if key in row)

    return cell


COLUMNS = {
    "step": lambda row: row["contender"],
    "time (quartiles)": lambda row: seconds_cell(row["seconds"]),
    "× fast (quartiles)": lambda row: ratio_cell(row["ratio"]),
    "queries/s": _cell(["queries_per_second"], 1, 2),
    "trace / compile, s": _cell(["trace_seconds", "compile_seconds"], 1),
    "matmul GFLOP": _cell(["matmul_flops"], 1e9),
    "XLA's GFLOP / GB, loops once": _cell(["xla_flops_loops_once", "xla_bytes_loops_once"], 1e9),
    "temporary MiB": _cell(["temp_bytes"], 2**20, 0),
}


def main(arguments: Sequence[str]) -> None:
    """The command line."""
    parser = command_line("train_step", __doc__)
    add_backbone(parser)
    add_contenders(parser)
    add_torch_compile(parser)
    add_train_shape(parser)
    parser.add_argument("--full", action="store_true", help="train all weights, not adapters")
    parser.add_argument("--lora_rank", type=positive, default=64, help="default 64")
    parser.add_argument(
        "--gradcache", type=positive, nargs="*", default=[2, 4, 8], help="numbers of micro-batches"
    )
    parser.add_argument(
        "--plain", type=positive, nargs="*", default=[4], help="numbers of micro-batches"
    )
    parser.add_argument("--remat", choices=("dots", "full"), nargs="*", default=["dots", "full"])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="of ours: fast and these")
    parser.add_argument("--unrolled", action="store_true", help="also without a loop over layers")
    options = parser.parse_args(arguments)
    jax.config.update("jax_enable_compilation_cache", False)  # the compile times are to be real
    measure(options, arguments).finish(COLUMNS, options.output)


if __name__ == "__main__":
    main(sys.argv[1:])
