"""The measurement of what metrics cost, run as a user runs it, on a small case."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.serving.table import measured


@pytest.mark.usefixtures("no_server")
def test_metrics_are_a_small_part_of_a_step(model_folder: Path) -> None:
    sizes = ["--rows", "2", "--context", "3000", "--tokens", "8", "--pairs", "6"]
    settings = ["--engine", '{"kv_cache_memory_bytes": 500000000, "enforce_eager": true}']
    header, lines = measured(
        "loadtest.benchmarks.kernels.metrics_overhead", "--model", str(model_folder), *sizes, *settings
    )
    assert header[-3:] == ["step ms", "share", "longer by us"]
    assert [line[:2] for line in lines] == [["2", "one by one"], ["2", "at once"]]
    for line in lines:
        counting, timing, recall, replayed = map(float, line[2:6])
        assert min(counting, timing, recall) > 0
        # There are graphs on a GPU only.
        assert replayed == 0
    # On a CPU the engine serves rows one by one.
    (step, share, longer), others = lines[0][6:], lines[1][6:]
    calls = sum(map(float, lines[0][2:5]))
    assert calls / (float(step) * 1e3) == pytest.approx(float(share.rstrip("%")) / 100, rel=0.05, abs=1e-4)
    # What it is on an idle machine stands in loadtest/RESULTS.md.
    assert calls / (float(step) * 1e3) < 0.05
    # The median between the ends of its interval.
    assert len(longer.split()) == 3
    assert others == ["", "", ""]
