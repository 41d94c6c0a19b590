"""Intervals, p-values and their adjustment."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_sparse.quality.statistics import LEAST_DOCUMENTS, MOST_EXACT_DOCUMENTS, Value, estimate, holm, least_p

scores = st.floats(-1, 1).map(lambda value: round(value, 3))
values = st.lists(st.builds(Value, st.integers(0, 12), st.sampled_from("abc"), scores), min_size=1, max_size=60)


@given(values)
def test_the_mean_weighs_each_stratum_equally(found: list[Value]) -> None:
    means = [np.mean([one.value for one in found if one.stratum == name]) for name in {one.stratum for one in found}]
    assert estimate(found).mean == pytest.approx(np.mean(means))


@given(values)
def test_an_interval_needs_documents_not_prompts(found: list[Value]) -> None:
    one = estimate(found)
    assert one.pairs == len(found)
    assert (one.interval is None) == (one.p is None) == (one.documents < LEAST_DOCUMENTS)


@given(values)
def test_the_same_values_give_the_same_numbers(found: list[Value]) -> None:
    assert estimate(found) == estimate(list(found))


@given(st.integers(1, 20), st.integers(1, 4))
def test_equal_inputs_show_nothing(documents: int, prompts: int) -> None:
    one = estimate(Value(document, "a", 0.0) for document in range(documents) for _ in range(prompts))
    assert one.mean == 0
    if documents >= LEAST_DOCUMENTS:
        assert one.interval == (0, 0)
        assert one.p == 1


def test_without_values_nothing_is_known() -> None:
    one = estimate([])
    assert (one.pairs, one.mean, one.interval, one.p) == (0, None, None, None)


@given(st.integers(LEAST_DOCUMENTS, 30))
def test_all_documents_on_one_side_give_the_least_p(documents: int) -> None:
    one = estimate(Value(document, "a", 0.5 + document / 100) for document in range(documents))
    if documents <= MOST_EXACT_DOCUMENTS:
        assert one.p == least_p(documents)
    else:
        assert one.p is not None
        assert 0 < one.p < 1e-3


@pytest.mark.parametrize("documents", [6, 10, 24])
def test_intervals_cover_and_p_values_err_as_often_as_they_say(documents: int, generator: torch.Generator) -> None:
    """Prompts of a document agree (a shared part as large as their own): prompts taken as independent cover 75 %."""
    rng = np.random.default_rng(generator.initial_seed())
    covered, wrong, trials = 0, 0, 400
    for _ in range(trials):
        shared = rng.normal(size=documents)
        one = estimate(
            Value(document, kind, shared[document] + rng.normal())
            for document in range(documents)
            for kind in "abc"
            for _ in range(2)
        )
        assert one.interval is not None
        assert one.p is not None
        covered += one.interval[0] <= 0 <= one.interval[1]
        wrong += one.p <= 0.05
    # Five standard errors of a share of 400 around 5 %, and one percent for the bootstrap itself.
    assert abs(covered / trials - 0.95) < 0.065
    assert wrong / trials < 0.105


def test_a_shift_moves_mean_and_interval(generator: torch.Generator) -> None:
    rng = np.random.default_rng(generator.initial_seed())
    drawn = rng.normal(size=(12, 3))

    def shifted(by: float) -> list[Value]:
        return [Value(document, str(kind), drawn[document, kind] + by) for document in range(12) for kind in range(3)]

    first, second = estimate(shifted(0)), estimate(shifted(0.25))
    assert first.interval is not None
    assert second.interval is not None
    assert second.interval == pytest.approx((first.interval[0] + 0.25, first.interval[1] + 0.25))


@given(st.lists(st.none() | st.floats(0, 1), max_size=30))
def test_holm_keeps_the_order_and_lowers_nothing(p_values: list[float | None]) -> None:
    adjusted = holm(p_values)
    pairs = sorted((p, new) for p, new in zip(p_values, adjusted, strict=True) if p is not None and new is not None)
    assert len(pairs) == sum(p is not None for p in p_values)
    assert all(p <= new <= 1 for p, new in pairs)
    assert [new for _, new in pairs] == sorted(new for _, new in pairs)
    if pairs:
        assert pairs[0][1] == min(1.0, len(pairs) * pairs[0][0])


def test_holm_by_hand() -> None:
    assert holm([0.01, None, 0.04, 0.03]) == pytest.approx([0.03, None, 0.06, 0.06])
