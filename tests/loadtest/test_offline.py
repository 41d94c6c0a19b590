"""Densities are of what ran since the last reading, and at first since the reader was made."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from vllm_sparse.metrics import DIRECTORY_VARIABLE, PROMETHEUS_VARIABLE

SCRIPT = """
from prometheus_client import Histogram
from loadtest.offline import DensityReader

ratio = Histogram("vllm_sparse_density_ratio", "Share of the keys that are read", ["phase", "method"])
ratio.labels("prefill", "dhsa").observe(0.9)
read = DensityReader()
print(read())
ratio.labels("prefill", "dhsa").observe(0.2)
ratio.labels("prefill", "dhsa").observe(0.4)
ratio.labels("decode", "tidal").observe(0.5)
print({name: round(density, 6) for name, density in sorted(read().items())})
print(read())
"""


def test_a_reading_holds_nothing_that_ran_before(tmp_path: Path) -> None:
    # Where its files are is told to prometheus_client before it is imported.
    environment = {**os.environ, DIRECTORY_VARIABLE: str(tmp_path), PROMETHEUS_VARIABLE: str(tmp_path)}
    ended = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.stdout.splitlines() == ["{}", "{'decode/tidal': 0.5, 'prefill/dhsa': 0.3}", "{}"], ended.stderr
