"""What is read from the server's metrics."""

from __future__ import annotations

from typing import Any

import pytest

from loadtest.load.report.server_metrics import (
    density,
    density_series,
    fallback_share,
    fallbacks,
    series_of,
    time_series,
)
from loadtest.load.scrape import parse


def reading(seconds: float, count: float, total: float, dense: float, running: str = "3") -> dict[str, Any]:
    """A reading of two engines' density and fallbacks."""
    labels = 'phase="prefill",method="dhsa"'
    exposition = f"""
# HELP vllm:num_requests_running Running.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{{engine="0",model_name="m"}} {running}
vllm:num_requests_running{{engine="1",model_name="m"}} 2
# TYPE vllm:request_success counter
vllm:request_success_total{{engine="0"}} 9
# TYPE vllm_sparse_density_ratio histogram
vllm_sparse_density_ratio_bucket{{{labels},le="0.5"}} {count}
vllm_sparse_density_ratio_bucket{{{labels},le="+Inf"}} {count}
vllm_sparse_density_ratio_count{{{labels}}} {count}
vllm_sparse_density_ratio_sum{{{labels}}} {total}
# TYPE vllm_sparse_fallbacks counter
vllm_sparse_fallbacks_total{{{labels},reason="no_room"}} {dense}
"""
    return {"seconds": seconds, "samples": parse(exposition)}


READINGS = [reading(0, 10, 5, 0), reading(10, 30, 9, 5), {"seconds": 15, "error": "timeout"}, reading(20, 40, 10, 10)]


def test_only_what_matters_is_kept() -> None:
    names = {sample["name"] for sample in READINGS[0]["samples"]}
    assert names == {
        "vllm:num_requests_running",
        "vllm_sparse_density_ratio_count",
        "vllm_sparse_density_ratio_sum",
        "vllm_sparse_fallbacks_total",
    }
    assert len(reading(0, 1, 1, 1, running="NaN")["samples"]) == len(READINGS[0]["samples"]) - 1


def test_density_is_of_what_ran_meanwhile() -> None:
    whole = series_of(READINGS, 0, 20)
    assert density(whole) == {"prefill/dhsa": pytest.approx(5 / 30)}
    assert density(series_of(READINGS, 0, 9)) == {"prefill/dhsa": pytest.approx(4 / 20)}
    assert density(series_of(READINGS, 12, 18)) == {"prefill/dhsa": pytest.approx(1 / 10)}
    assert density([]) == {}
    assert fallback_share(whole) == {"prefill/dhsa": pytest.approx(10 / 40)}
    assert fallbacks(whole) == [{"phase": "prefill", "method": "dhsa", "reason": "no_room", "count": 10}]
    times, values = zip(*density_series(READINGS)["prefill/dhsa"], strict=True)
    assert times == (10, 20)
    assert values == pytest.approx((0.2, 0.1))


def test_a_restarted_server_counts_anew() -> None:
    assert density([reading(0, 100, 90, 0), reading(5, 4, 1, 0)]) == {"prefill/dhsa": pytest.approx(0.25)}


def test_what_the_server_lacks_is_missing_not_zero() -> None:
    series = time_series(READINGS)
    assert series["Requests running"] == [(0, 5), (10, 5), (20, 5)]
    assert series["Requests waiting"] is None
    assert series["KV cache used, %"] is None
