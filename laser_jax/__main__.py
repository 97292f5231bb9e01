"""`laser COMMAND ...`: one front door to the programs. `laser train` is `laser_jax.train`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "train": "train",
    "encode": "encode_corpus",
    "search": "search",
    "evaluate": "evaluate",
    "think": "think",
    "rewrite": "rewrite",
    "prepare": "prepare",
    "pretrain": "pretrain",
    "quickstart": "quickstart",
    "import-gguf": "import_gguf",
}
"""Command -> its room, whose docstring says in a line what it is for."""


def _help() -> str:
    lines = ["usage: laser COMMAND [--help | options]", ""]
    for command, room in COMMANDS.items():
        purpose = importlib.import_module(f"laser_jax.{room}").__doc__ or ""
        lines.append(f"  {command:<12} {purpose.strip()}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    if not given or given[0] in ("-h", "--help"):
        print(_help())
        return
    command, *rest = given
    if command not in COMMANDS:
        sys.exit(f"error: laser has no command {command!r}\n{_help()}")
    if command == "train":
        from laser_jax.train.before_imports import leave_on_signals

        leave_on_signals()  # before jax and the rest are imported, which takes seconds
    importlib.import_module(f"laser_jax.{COMMANDS[command]}.run").main(rest)


if __name__ == "__main__":
    main()
