"""The measurement of what metrics cost, run as a user runs it, on a small case."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.serving.table import measured


@pytest.mark.usefixtures("no_server")
def test_metrics_are_a_small_part_of_a_step(model_folder: Path) -> None:
    sizes = ["--rows", "2", "--context", "3000", "--tokens", "8"]
    settings = ["--engine", '{"kv_cache_memory_bytes": 500000000, "enforce_eager": true}']
    header, lines = measured("loadtest.kernels.metrics_overhead", "--model", str(model_folder), *sizes, *settings)
    assert header[-1] == "share"
    assert [line[:2] for line in lines] == [["2", "one by one"], ["2", "at once"]]
    for line in lines:
        counting, timing, recall, replayed, step = map(float, line[2:7])
        assert min(counting, timing, recall, step) > 0
        # There are graphs on a GPU only.
        assert replayed == 0
        # What it is on an idle machine stands in loadtest/RESULTS.md.
        assert (counting + timing + recall) / (step * 1e3) < 0.05
