"""`laser evaluate run | model | mteb | compare`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from laser_jax.files.terminal import fail

COMMANDS = {
    "run": ("scored_run", "scores a TREC run as trec_eval does"),
    "model": ("model", "evaluates a model on a BEIR directory or on BRIGHT, at every K"),
    "mteb": ("mteb", "evaluates a model on tasks of mteb"),
    "compare": ("compare", "several evaluated models in one table"),
}
"""Command -> its module, and what it is for."""


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    program = "python -m laser_jax.evaluate"
    lines = [f"  {command:<8} {purpose}" for command, (_, purpose) in COMMANDS.items()]
    usage = "\n".join([f"usage: {program} COMMAND [--help | options]", "", *lines])
    if not given or given[0] in ("-h", "--help"):
        print(usage)
        return
    command, *rest = given
    if command not in COMMANDS:
        named = command.removeprefix("--").partition("=")[0]
        hint = f"; write {program} {named} {command} ..." if named in COMMANDS else ""
        sys.exit(f"error: evaluate has no command {command!r}{hint}\n{usage}")
    try:
        module = importlib.import_module(f"laser_jax.evaluate.{COMMANDS[command][0]}")
        module.main(f"{program} {command}", rest)
    except (ValueError, OSError, ImportError) as error:
        fail(error)
