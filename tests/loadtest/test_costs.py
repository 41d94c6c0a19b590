"""The benchmark of predicted costs: what it says of a verdict, and its tables."""

from __future__ import annotations

import argparse

import pytest

from loadtest.benchmarks.kernels import costs
from loadtest.benchmarks.kernels.decode import step_seconds
from tests.loadtest.test_decode import needs_executor
from vllm_sparse.step.roles import Role


@pytest.mark.parametrize(
    ("is_sparse", "gained", "words"),
    [
        (True, 0.2, "sparse"),
        (True, -0.2, "sparse, wrong"),
        (False, 0.05, "dense"),
        (False, -0.2, "dense"),
        (False, 0.2, "dense, late"),
    ],
)
def test_verdicts_in_words(is_sparse: bool, gained: float, words: str) -> None:
    assert costs.judged(is_sparse, gained, 0.1) == words


def test_a_step_is_the_sum_of_its_layers() -> None:
    roles = [Role.DENSE, Role.DENSE_AND_WRITE, Role.READ, Role.READ, Role.WRITE_AND_READ]
    assert step_seconds(roles, selection=100, attention=10, dense=1) == 1 + 101 + 10 + 10 + 110


def test_a_chunk_lies_within_its_context() -> None:
    assert costs.chunk_of("512x8192").prompt_tokens == 8192
    for text in ("512", "8192x512", "x512"):
        with pytest.raises(argparse.ArgumentTypeError):
            costs.chunk_of(text)


@needs_executor
def test_tables_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """Cells that a method's budget makes dense are left out."""
    geometry = ["--query-heads", "4", "--kv-heads", "2", "--head-size", "64", "--layers", "4", "--repeats", "1"]
    cells = ["--cells", "2x300", "1x200", "--chunks", "64x320", "--prompt-methods", "dhsa"]
    costs.main([*geometry, *cells, "--methods", 'tidal={"budget_tokens": 192}'])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    tidal, chunk = lines[1], lines[3]
    assert [lines[0].count("|"), tidal.count("|")] == [10, 10]
    assert tidal.startswith("| 2 | 300 | tidal")
    assert chunk.startswith("| 64 | 320 | dhsa | ")
    assert len(lines) == 4
