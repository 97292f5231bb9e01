"""The encoders that are timed beside each other: ours, and PyTorch's.

All of them embed the same rows with the same random weights, and must give the same vectors.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.measure import BenchmarkError, Report, Run, torch_unusable
from benchmarks.targets import COMPILED, PYTORCH
from benchmarks.workload import kernel_for, make_backbone, random_variables, shape_of
from laser_jax import encode
from laser_jax.batch import Tokens
from laser_jax.config import AttentionKernel, Dtype, RetrieverConfig
from laser_jax.modeling.backbone import unstack_layers

OURS = "ours"
ENCODE: Any = jax.jit(encode, static_argnames=("config", "num_thinking_steps", "attention"))
# Of the difference between two unit vectors. bfloat16 carries 8 bits through every layer.
TOLERANCE: dict[Dtype, float] = {"float32": 1e-4, "bfloat16": 0.1}


def torch_names(options: argparse.Namespace) -> tuple[Sequence[str], list[str]]:
    """The PyTorch contenders that are asked for and can run, and a note where there are none."""
    why_not = "--no_torch" if options.no_torch else torch_unusable()
    if why_not is not None:
        return (), [f"PyTorch is not measured: {why_not}."]
    return [name for name in PYTORCH if name != COMPILED or options.torch_compile], []


class Encoders:
    """Ours, and PyTorch's where it can run.

    Attributes:
        config: the model that all of them compute.
        variables: its weights, with every layer apart.
        kernel: our attention.
        torch_models: PyTorch's copies of the model, by their transcription.
    """

    def __init__(self, options: argparse.Namespace, torch: Sequence[str]):
        """Makes the models, by the options of `add_contenders`; of PyTorch's those named."""
        backbone, dtype = shape_of(options), options.dtype
        self.config = RetrieverConfig(backbone, dtype=dtype)
        self.kernel: AttentionKernel = kernel_for(backbone, dtype)
        module = make_backbone(backbone, dtype, lora=None)
        scanned = random_variables(module)
        self.variables = unstack_layers(scanned)
        self.torch_models: dict[Any, Any] = {}
        if torch:
            from benchmarks.torch_reference import load

            self.torch_models = load(torch, scanned, module, dtype, train=False)

    @classmethod
    def that_can_run(cls, options: argparse.Namespace, report: Report) -> Encoders:
        """All that are asked for. The report is told which kernel is ours and what is absent."""
        names, notes = torch_names(options)
        encoders = cls(options, names)
        report.notes += notes
        report.settings["attention"] = encoders.kernel
        return encoders

    def on(self, tokens: Tokens, thinking_steps: int) -> dict[str, Run]:
        """The contenders on one batch, by name; each call embeds it.

        Raises:
            BenchmarkError: two contenders give different vectors.
        """
        contenders: dict[str, Run] = {OURS: self.ours(tokens, thinking_steps)}
        wanted_BD = np.asarray(contenders[OURS]())
        for transcription, model in self.torch_models.items():
            run = transcription.encoder(model, tokens, thinking_steps)
            got_BD = run().cpu().numpy()
            require_same_vectors(transcription.name, got_BD, wanted_BD, self.config.dtype)
            contenders[transcription.name] = run
        return contenders

    def ours(self, tokens: Tokens, thinking_steps: int) -> functools.partial[jax.Array]:
        """A jitted program and its arguments, those by name being static."""
        mask_BT = np.arange(tokens.ids_BT.shape[1]) < tokens.lengths_B[:, None]
        return functools.partial(
            ENCODE,
            *(self.variables, jnp.asarray(tokens.ids_BT), jnp.asarray(mask_BT, jnp.int32)),
            config=self.config,
            num_thinking_steps=thinking_steps,
            attention=self.kernel,
        )


def require_same_vectors(
    name: str, got_BD: np.ndarray, wanted_BD: np.ndarray, dtype: Dtype
) -> None:
    """Raises a BenchmarkError where a contender's unit rows are not ours."""
    distance = float(np.linalg.norm(got_BD - wanted_BD, axis=1).max())
    if not distance <= TOLERANCE[dtype]:
        raise BenchmarkError(
            f"{name} computes another function than ours: an embedding is {distance:.2g} off, "
            f"more than {TOLERANCE[dtype]:.2g}"
        )
