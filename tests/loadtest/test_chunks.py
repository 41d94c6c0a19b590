"""The benchmark of several requests' prompt chunks."""

from __future__ import annotations

import pytest

from loadtest.benchmarks.kernels import chunks
from tests.loadtest.test_kernels import needs_executor


@needs_executor
def test_together_and_one_by_one_give_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    chunks.main(["--sizes", "256x700", "300x300", "--methods", "dhsa", "streaming", "--repeats", "1"])
    lines = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines()]
    assert [cells[0].strip() for cells in lines[2:]] == ["dhsa", "streaming", "mixed"]
    for cells in lines[2:]:
        *milliseconds, difference = map(float, cells[1:])
        assert all(number > 0 for number in milliseconds)
        assert difference < 1e-2
