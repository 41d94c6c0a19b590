"""Late densities per layer and head, and histograms filled many values at a time."""

from __future__ import annotations

import numpy as np
import prometheus_client
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_sparse.metrics import Geometry, RowDensity
from vllm_sparse.metrics.density import RECENT_WEIGHT, RecentDensity
from vllm_sparse.metrics.histogram import observe_all
from vllm_sparse.step.plan import RowSpan

GEOMETRY = Geometry(layers=range(4), query_heads=4, kv_heads=2, token_bytes=256)


def test_layers_that_share_a_list_are_told_apart_by_number() -> None:
    row = RowDensity("decode", "tidal")
    span = RowSpan(0, 0, 1, 100)
    first, second = torch.tensor([10, 20], dtype=torch.int32), torch.tensor([30, 40], dtype=torch.int32)
    for layer, kept in ((1, first), (2, first), (5, second)):
        row.add(layer, kept, span, 1, 2)
    assert row.layers == [1, 2, 5]
    assert row.numbers == 4, "a shared list is fetched once"
    assert row.kept_by_head(torch.cat(row.kept).numpy()).tolist() == [[10, 20], [10, 20], [30, 40]]


def test_first_rows_count_alike_and_late_ones_more() -> None:
    recent = RecentDensity(GEOMETRY)
    recent.observe("prefill", "dhsa", [2, 3], np.array([[0.2, 0.4], [0.6, 0.8]]))
    recent.observe_alike("prefill", "dhsa", [2, 3], 0.0)
    told = recent.as_json()["prefill"]["dhsa"]
    assert told["rows"] == 2
    assert told["density"] == [[1.0] * 4, [1.0] * 4, [0.1, 0.1, 0.2, 0.2], [0.3, 0.3, 0.4, 0.4]]
    many = round(5 / RECENT_WEIGHT)
    for _ in range(many):
        recent.observe_alike("prefill", "dhsa", [2, 3], 1.0)
    assert np.min(recent.as_json()["prefill"]["dhsa"]["density"]) > 0.99
    assert "decode" not in recent.as_json()


@given(st.lists(st.tuples(st.sampled_from([(2, 3), (1,), ()]), st.floats(0, 1), st.booleans()), max_size=200))
def test_rows_that_are_alike_count_as_each_of_them(rows: list[tuple[tuple[int, ...], float, bool]]) -> None:
    """In any order with others, of other layers, and asked about in between."""
    one_by_one, folded = RecentDensity(GEOMETRY), RecentDensity(GEOMETRY)
    known = {layers: list(layers) for layers, _, _ in rows}
    for index, (layers, density, alike) in enumerate(rows):
        by_head = np.full((len(layers), 2), density)
        one_by_one.observe("decode", "hip", known[layers], by_head)
        if alike:
            folded.observe_alike("decode", "hip", known[layers], density)
        else:
            folded.observe("decode", "hip", known[layers], by_head)
        if index % 50 == 7:
            folded.as_json()
    expected, found = (recent.as_json().get("decode", {}).get("hip") for recent in (one_by_one, folded))
    assert (expected is None) == (found is None)
    if expected is not None and found is not None:
        assert found["rows"] == expected["rows"]
        # Both are rounded to four places.
        np.testing.assert_allclose(found["density"], expected["density"], rtol=0, atol=1.01e-4)


BOUNDS = (0.1, 0.5, 1.0)


@given(st.lists(st.floats(0, 3), min_size=1, max_size=40))
def test_many_values_are_as_each_of_them(values: list[float]) -> None:
    registry = prometheus_client.CollectorRegistry()
    one, all_at_once = (
        prometheus_client.Histogram(name, "", ["label"], registry=registry, buckets=BOUNDS).labels("a")
        for name in ("one", "all")
    )
    for value in values:
        one.observe(value)
    observe_all(all_at_once, values)
    for suffix, bound in (*(("bucket", bound) for bound in (*BOUNDS, float("inf"))), ("count", None), ("sum", None)):
        labels = {"label": "a"} | ({} if bound is None else {"le": str(bound).replace("inf", "+Inf")})
        expected = registry.get_sample_value(f"one_{suffix}", labels)
        assert expected is not None
        assert registry.get_sample_value(f"all_{suffix}", labels) == pytest.approx(expected)
