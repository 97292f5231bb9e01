"""The turn of a user as a tokenizer's chat template renders it: a program of somebody else."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

from laser_jax.data.tokenizer_files import TokenizationError

_MOST_LINES = 100_000


def user_turn(tokenizer: Any, content: str) -> str:
    """A user's turn and the start of the answer. Raises a TokenizationError where it fails."""
    try:
        return tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
    except Exception as error:  # whatever somebody's program raises
        raise TokenizationError(
            f"the tokenizer's chat template fails on a user's turn: {type(error).__name__}: "
            f"{error}. Mend it in chat_template.jinja or tokenizer_config.json, or set "
            "prompt.chat_template: false"
        ) from error


def bounded(render: Callable[[], None]) -> None:
    """Calls `render`, and raises within it once a chat template has run too many of its lines, as
    two nested loops can for days."""
    left = _MOST_LINES

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal left
        if frame.f_code.co_filename != "<template>":  # as jinja2 names it
            return None
        left -= 1
        if left < 0:
            raise RuntimeError(f"it runs on after {_MOST_LINES:,} of its lines")
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        render()
    finally:
        sys.settrace(before)
