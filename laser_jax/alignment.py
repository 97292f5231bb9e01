"""Which states of the written chain of thought teach which thinking step. numpy only.

K thinking steps of the latent view are aligned with K of the M segments of the chain of thought
("keyframes"; LaSER section 3.3 and equation 11). Everything here is positions, no states.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from laser_jax.config import KeyframeRule


def keyframe_segments(num_segments: int, num_thinking_steps: int, rule: KeyframeRule) -> np.ndarray:
    """The segment that teaches each thinking step.

    Args:
        num_segments: M, the segments of the chain of thought, at least 1.
        num_thinking_steps: K, the thinking steps, at least 1.
        rule: `official` is the released code's `linspace(0, M-1, K).long()`, and for M < K all
            segments, the last repeated; `paper` is equation 11, `max(floor(i M / K) - 1, 0)` for
            i = 1..K.

    Returns:
        [K] int64, 0-based segment indices, not decreasing.

    Raises:
        ValueError: when M or K is below 1.
    """
    M, K = num_segments, num_thinking_steps
    if M < 1 or K < 1:
        raise ValueError(f"keyframes need at least one segment and one step, got M={M}, K={K}")
    steps_K = np.arange(K)
    if rule == "next":
        return np.minimum(np.maximum((steps_K + 1) * M // K - 1, 0) + 1, M - 1)
    if rule == "paper":
        return np.maximum((steps_K + 1) * M // K - 1, 0)
    if M < K:
        return np.minimum(steps_K, M - 1)
    return _linspace(M - 1, K)


def _linspace(last: int, K: int) -> np.ndarray:
    """`torch.linspace(0, last, K).long()` bit for bit, [K] int64.

    torch's float32 values fall just below some integers, so the integer formula differs from it
    (M = 17, K = 15 is the first). It counts the first half up from 0 and the second half
    down from `last`, each with a fused multiply-add: float64 holds the product exactly, and the
    sum is rounded to float32 once.
    """
    if K == 1:
        return np.zeros(1, np.int64)
    step = float(np.float32(last) / np.float32(K - 1))
    steps_K = np.arange(K)
    from_start_K = step * steps_K
    from_end_K = last - step * (K - 1 - steps_K)
    values_K = np.where(steps_K < K // 2, from_start_K, from_end_K)
    return values_K.astype(np.float32).astype(np.int64)


def keyframe_positions(
    segment_ends: Sequence[int], last: int, num_thinking_steps: int, rule: KeyframeRule
) -> np.ndarray:
    """The token positions in the explicit input whose states teach the K thinking steps.

    Args:
        segment_ends: positions of the M segments' last tokens; empty for an empty chain of thought.
        last: position of the input's last token, which stands in when there is no segment.
        num_thinking_steps: K.
        rule: see `keyframe_segments`.

    Returns:
        [K] int32.
    """
    if not segment_ends:
        return np.full(num_thinking_steps, last, np.int32)
    chosen_K = keyframe_segments(len(segment_ends), num_thinking_steps, rule)
    return np.asarray(segment_ends, np.int32)[chosen_K]


def token_segment_ends(ids: Sequence[int], start: int, separator_id: int | None) -> list[int]:
    """Where the segments of a chain of thought end, found on its tokens (the official way).

    Args:
        ids: the whole explicit input.
        start: position of the chain of thought's first token; at or beyond the end of `ids` the
            chain of thought is empty.
        separator_id: the token that ends a segment; None when the vocabulary has no such token,
            and then the chain of thought is one segment.

    Returns:
        Positions in `ids`, increasing: every separator from `start` on, and the last token when it
        is no separator, since a tail without a separator is a segment of its own.
    """
    ends = [position for position in range(start, len(ids)) if ids[position] == separator_id]
    if start < len(ids) and ids[-1] != separator_id:
        ends.append(len(ids) - 1)
    return ends
