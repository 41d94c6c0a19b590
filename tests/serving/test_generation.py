"""The measurement of long generations, run as a user runs it, on a small case."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.serving.table import measured

SPARSE = '{"sparse_decode": "tidal", "tidal_budget_tokens": 256, "sparse_min_tokens": 0}'
# Nothing is read but the forced tokens of a page at either end, and from no layer that chose with care.
BLIND = (
    '{"sparse_decode": "tidal", "tidal_budget_tokens": 16, "tidal_sink_tokens": 1, "tidal_recent_tokens": 1, '
    '"tidal_dense_layers": 0, "tidal_reselect_layers": [7], "sparse_min_tokens": 0}'
)


@pytest.mark.usefixtures("no_server")
def test_a_method_is_compared_with_dense(model_folder: Path, answers_known: None) -> None:
    sizes = ["--tokens", "3000", "--generated", "150", "--engine", '{"kv_cache_memory_bytes": 500000000}']
    variants = ["--variant", f"tidal={SPARSE}", "--variant", f"blind={BLIND}"]
    _, lines = measured("loadtest.quality.generation", "--model", str(model_folder), *sizes, *variants)
    dense, tidal, blind = lines
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
