"""The encoders that are timed beside each other: ours, and PyTorch's.

All of them embed the same rows with the same random weights, and must give the same vectors.
"""

from __future__ import annotations

import argparse
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.measure import BenchmarkError, Run, torch_unusable
from benchmarks.workload import SHAPES, drawn_unstacked, kernel_for, make_backbone, random_variables
from laser_jax import encode
from laser_jax.batch import Tokens
from laser_jax.config import AttentionKernel, Dtype, RetrieverConfig
from laser_jax.modeling.backbone import unstack_layers

OURS = "ours"
# Of the difference between two unit vectors. bfloat16 carries 8 bits through every layer.
TOLERANCE: dict[Dtype, float] = {"float32": 1e-4, "bfloat16": 0.1}


class Encoders:
    """Ours, and PyTorch's where it can run.

    Attributes:
        config: the model that all of them compute.
        variables: its weights, with every layer apart.
        kernel: our attention.
        torch_models: PyTorch's copies of the model, by their transcription.
        notes: why PyTorch is absent, if it is.
    """

    def __init__(self, options: argparse.Namespace):
        """Makes the models, by the options of `add_backbone` and `add_contenders`."""
        backbone, dtype = SHAPES[options.backbone], options.dtype
        self.config = RetrieverConfig(backbone, dtype=dtype)
        self.kernel: AttentionKernel = kernel_for(options.attention, backbone, dtype)
        self.torch_models: dict[Any, Any] = {}
        why_not = "--no_torch" if options.no_torch else torch_unusable()
        self.notes = [f"PyTorch is not measured: {why_not}."] if why_not else []
        if why_not:  # nobody wants the files, and no second copy need fit
            self.variables = drawn_unstacked(backbone, dtype)
            return
        from benchmarks.torch_reference import exported, load, transcriptions

        scanned = random_variables(make_backbone(backbone, dtype, lora=None))
        self.variables = unstack_layers(scanned)
        wanted = transcriptions(torch_compile=options.torch_compile)
        with exported(scanned, backbone, None, dtype) as export:
            self.torch_models = {t: load(export, t, train=False) for t in wanted}

    def on(self, tokens: Tokens, thinking_steps: int) -> dict[str, Run]:
        """The contenders on one batch, by name; each call embeds it.

        Raises:
            BenchmarkError: two contenders give different vectors.
        """
        mask_BT = np.arange(tokens.ids_BT.shape[1]) < tokens.lengths_B[:, None]
        ids_BT, mask_BT = jnp.asarray(tokens.ids_BT), jnp.asarray(mask_BT, jnp.int32)
        program = functools.partial(
            encode,
            config=self.config,
            num_thinking_steps=thinking_steps,
            attention=self.kernel,
        )
        run = functools.partial(jax.jit(program), self.variables, ids_BT, mask_BT)
        contenders: dict[str, Run] = {OURS: run}
        if self.torch_models:
            from benchmarks.torch_reference import TorchEncoder, left_padded

            for transcription, model in self.torch_models.items():
                rows = left_padded(tokens, str(model.device))
                contenders[transcription.name] = TorchEncoder(
                    transcription, model, rows, thinking_steps
                )
        wanted_BD = np.asarray(contenders[OURS]())
        for name in contenders.keys() - {OURS}:
            got_BD = contenders[name]().cpu().numpy()
            require_same_vectors(name, got_BD, wanted_BD, self.config.dtype)
        return contenders


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
