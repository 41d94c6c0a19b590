"""The measurement of what metrics cost, run as a user runs it, on a small case."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.usefixtures("no_server")
def test_metrics_are_a_small_part_of_a_step(model_folder: Path) -> None:
    command = [sys.executable, "-m", "loadtest.kernels.metrics_overhead", "--model", str(model_folder)]
    sizes = ["--rows", "2", "--context", "3000", "--tokens", "8"]
    settings = ["--engine", '{"kv_cache_memory_bytes": 500000000, "enforce_eager": true}']
    ended = subprocess.run(
        [*command, *sizes, *settings],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=400,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout[-6000:]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in ended.stdout.splitlines() if line[:2] == "| "]
    header, *lines = rows
    assert header[-1] == "share"
    assert [line[:2] for line in lines] == [["2", "one by one"], ["2", "at once"]]
    for line in lines:
        counting, timing, recall, step = map(float, line[2:6])
        assert min(counting, timing, recall, step) > 0
        # What it is on an idle machine stands in loadtest/RESULTS.md.
        assert (counting + timing + recall) / (step * 1e3) < 0.05
