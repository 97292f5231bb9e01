"""`laser evaluate run | model | mteb | compare`."""

import importlib
from collections.abc import Sequence

from laser_jax.command_line import chosen, ended_in_a_line, program_of

PURPOSES = {
    "run": "scores a TREC run as trec_eval does",
    "model": "evaluates a model on a BEIR directory or on BRIGHT, at every K",
    "mteb": "evaluates a model on tasks of mteb",
    "compare": "several evaluated models in one table",
}
"""Command -> what it is for. `run` is the module `scored_run`, the others those of their names."""


def main(arguments: Sequence[str] | None = None) -> None:
    program = program_of("evaluate")
    command, rest = chosen(program, PURPOSES, arguments)
    with ended_in_a_line():
        name = "scored_run" if command == "run" else command
        module = importlib.import_module(f"laser_jax.evaluate.{name}")
        module.main(f"{program} {command}", rest)
