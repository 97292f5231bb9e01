"""Keyframes: which segment's state teaches which thinking step."""

from __future__ import annotations

import numpy as np
import pytest

from laser_jax.alignment import keyframe_positions, keyframe_segments, token_segment_ends


def test_official_equals_torch_linspace_bit_for_bit() -> None:
    torch = pytest.importorskip("torch")
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("torch rounds linspace otherwise without fused multiply-add")
    for K in range(1, 33):
        for num_segments in range(K, 600):
            expected = torch.linspace(0, num_segments - 1, K).long().numpy()
            got = keyframe_segments(num_segments, K, "official")
            np.testing.assert_array_equal(got, expected, f"M={num_segments} K={K}")


def test_official_with_fewer_segments_than_steps_takes_all_and_repeats_the_last() -> None:
    assert keyframe_segments(3, 5, "official").tolist() == [0, 1, 2, 2, 2]
    assert keyframe_segments(1, 3, "official").tolist() == [0, 0, 0]


def test_official_with_one_step_takes_the_first_segment() -> None:
    assert keyframe_segments(7, 1, "official").tolist() == [0]


def test_paper_is_equation_11() -> None:
    for num_segments in range(1, 40):
        for K in range(1, 12):
            expected = [max(i * num_segments // K - 1, 0) for i in range(1, K + 1)]
            assert keyframe_segments(num_segments, K, "paper").tolist() == expected


@pytest.mark.parametrize("rule", ["official", "paper"])
def test_no_segment_or_no_step_is_refused(rule) -> None:
    with pytest.raises(ValueError, match="M=0, K=3"):
        keyframe_segments(0, 3, rule)
    with pytest.raises(ValueError, match="M=3, K=0"):
        keyframe_segments(3, 0, rule)


def test_positions_are_the_chosen_segments_ends() -> None:
    positions_K = keyframe_positions([4, 9, 12, 20, 21], 25, 3, "official")
    assert positions_K.dtype == np.int32
    assert positions_K.tolist() == [4, 12, 21]


@pytest.mark.parametrize("rule", ["official", "paper"])
def test_an_empty_chain_of_thought_gives_the_last_position_at_every_step(rule) -> None:
    assert keyframe_positions([], 11, 4, rule).tolist() == [11] * 4


def test_token_segments_end_at_separators_and_a_tail_is_a_segment() -> None:
    assert token_segment_ends([7, 1, 2, 7, 3, 7, 4, 5], 1, 7) == [3, 5, 7]
    assert token_segment_ends([7, 1, 2, 7, 7], 1, 7) == [3, 4]
    assert token_segment_ends([1, 2, 3], 1, 7) == [2]


def test_token_segments_without_a_separator_token_are_one_segment() -> None:
    assert token_segment_ends([1, 2, 3], 1, None) == [2]


@pytest.mark.parametrize("start", [3, 4, 9])
def test_a_start_at_or_beyond_the_end_is_an_empty_chain_of_thought(start) -> None:
    assert token_segment_ends([1, 2, 7], start, 7) == []
