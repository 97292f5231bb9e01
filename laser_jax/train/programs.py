"""The train step as compiled programs, one for every shape of a batch."""

from __future__ import annotations

import time
from typing import Any

import jax

from laser_jax.batch import Batch
from laser_jax.losses import Terms
from laser_jax.modeling.backbone import Variables
from laser_jax.step import TrainState


def shape_of(batch: Batch) -> str:
    """The shapes that a step is compiled for, in words."""
    parts = {"queries": batch.query, "documents": batch.documents, "explicit": batch.explicit}
    return ", ".join(
        f"{name} {tokens.ids_BT.shape[0]} x {tokens.ids_BT.shape[1]}"
        for name, tokens in parts.items()
        if tokens is not None
    )


class StepPrograms:
    """Runs the step, and compiles it where a batch has a new shape.

    Attributes:
        compiled: seconds of compiling by shape, in the order of their first batch.
    """

    def __init__(self, jitted: Any):
        self._jitted = jitted
        self._programs: dict[str, Any] = {}
        self.compiled: dict[str, float] = {}

    def __call__(
        self, state: TrainState, batch: Batch, teacher_variables: Variables | None
    ) -> tuple[TrainState, Terms]:
        shape = shape_of(batch)
        if shape not in self._programs:
            self.compile(state, batch, teacher_variables)
        return self._programs[shape](state, batch, teacher_variables)

    def compile(
        self, state: TrainState, batch: Batch, teacher_variables: Variables | None
    ) -> jax.stages.Compiled:
        """Compiles the step; arrays or `jax.ShapeDtypeStruct`s."""
        began, shape = time.monotonic(), shape_of(batch)
        program = self._jitted.lower(state, batch, teacher_variables).compile()
        self._programs[shape], self.compiled[shape] = program, time.monotonic() - began
        return program
