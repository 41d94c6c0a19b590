"""The measurement of long generations, run as a user runs it, on a small case."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SPARSE = '{"sparse_decode": "tidal", "tidal_budget": 256, "sparse_min_tokens": 0}'
# Nothing is read but the forced tokens of a page at either end, and from no layer that chose with care.
BLIND = (
    '{"sparse_decode": "tidal", "tidal_budget": 16, "tidal_sink_tokens": 1, "tidal_recent_tokens": 1, '
    '"tidal_full_layers": 0, "tidal_reselect_layers": [7], "sparse_min_tokens": 0}'
)


@pytest.mark.usefixtures("no_server")
def test_a_method_is_compared_with_dense(model_folder: Path, answers_known: None) -> None:
    command = [sys.executable, "-m", "loadtest.quality.generation", "--model", str(model_folder)]
    sizes = ["--tokens", "3000", "--generated", "150", "--engine", '{"kv_cache_memory_bytes": 500000000}']
    variants = ["--variant", f"tidal={SPARSE}", "--variant", f"blind={BLIND}"]
    ended = subprocess.run(
        [*command, *sizes, *variants],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=400,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout[-6000:]
    rows = [[cell.strip() for cell in text.split("|")[1:-1]] for text in ended.stdout.splitlines() if text[:2] == "| "]
    dense, tidal, blind = rows[1:]
    assert [dense[0], tidal[0], blind[0]] == ["dense", "tidal", "blind"]
    answers = dense[7].split(" / ")[1]
    assert int(answers) >= 5
    assert dense[1] == "1.000"
    assert float(dense[4]) > 0.98
    assert dense[7] == tidal[7] == f"{answers} / {answers}"
    assert 0.05 < float(tidal[1]) < 0.15
    assert float(tidal[4]) > 0.9
    assert float(blind[4]) < float(tidal[4])
    assert int(blind[7].split(" / ")[0]) < int(answers)
