"""Cases of the latency command."""

from __future__ import annotations

import argparse

import pytest

from loadtest.benchmarks.engine.latency import Case, Measurement, line, time_per_step


def test_a_case_is_tokens_or_requests_of_tokens() -> None:
    assert Case.parse("32768") == Case(1, 32768)
    assert Case.parse("8x4096") == Case(8, 4096)


@pytest.mark.parametrize("text", ["", "x", "8x", "x8", "0x8", "8x0", "-8", "8X8", "1x2x3", "8k"])
def test_other_cases_are_refused_with_what_is_allowed(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="REQUESTSxTOKENS, such as"):
        Case.parse(text)


def test_ratios_are_the_dense_time_over_the_lines() -> None:
    dense = Measurement("FLASH_ATTN", Case(8, 4096), 3.0, 0.02, {})
    sparse = Measurement("dhsa", Case(8, 4096), 1.5, 0.04, {"prefill/dhsa": 0.125})
    assert line(sparse, dense) == "| 8 | 4096 | dhsa | 0.125 | 1 | 1.500 | 2.00x | 40.00 | 0.50x |"
    untimed = Measurement("dhsa", Case(8, 4096), 1.5, None, {})
    assert line(untimed, dense).endswith("| 2.00x | - | - |")
    assert line(dense, untimed).endswith("| 20.00 | - |")


def test_time_per_token_counts_while_all_requests_decode() -> None:
    """Steps of 1 s while chunks are in them, of 0.25 s after; the first request is through at 3.75 s."""
    steps = [(0.0, [0, 0]), (1.0, [1, 0]), (2.0, [2, 0]), (3.0, [3, 1]), (3.25, [4, 2]), (3.75, [6, 4]), (4.0, [6, 5])]
    assert time_per_step([*steps, (4.25, [6, 6])], 6) == 0.25
    assert time_per_step([(1.0, [1]), (2.0, [2]), (4.0, [3])], 3) == 1.5
    assert time_per_step([(1.0, [2, 0]), (2.0, [2, 1]), (3.0, [2, 2])], 2) is None
