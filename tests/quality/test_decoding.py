"""Divergence of next tokens from the likeliest ones of both distributions, against the whole."""

from __future__ import annotations

import numpy as np
import pytest

from vllm_sparse.quality.measures.decoding import divergence
from vllm_sparse.quality.measures.generation import common_prefix
from vllm_sparse.quality.measures.parts import means_of_parts


def top(log_probabilities: np.ndarray, count: int) -> dict[int, float]:
    """The likeliest tokens, most likely first."""
    order = np.argsort(-log_probabilities)[:count]
    return {int(token): float(log_probabilities[token]) for token in order}


def distribution(rng: np.random.Generator, peak: float) -> np.ndarray:
    """Log probabilities of 1000 tokens."""
    logits: np.ndarray = rng.standard_normal(1000) * peak
    normalised: np.ndarray = logits - np.log(np.exp(logits).sum())
    return normalised


@pytest.mark.parametrize("peak", [1.0, 4.0, 8.0])
def test_divergence_is_the_whole_one_or_less_and_near_it_where_few_tokens_hold_the_mass(peak: float) -> None:
    rng = np.random.default_rng()
    for _ in range(30):
        reference = distribution(rng, peak)
        other = reference + rng.standard_normal(1000) * 0.3
        other -= np.log(np.exp(other).sum())
        whole = float((np.exp(reference) * (reference - other)).sum())
        found = divergence(top(reference, 20), top(other, 20))
        assert -1e-9 <= found <= whole + 1e-9
        if peak == 8.0:
            assert found == pytest.approx(whole, abs=0.02)


def test_divergence_of_equal_and_of_disjoint_distributions() -> None:
    rng = np.random.default_rng()
    reference = top(distribution(rng, 4.0), 20)
    assert divergence(reference, reference) == pytest.approx(0, abs=1e-9)
    # Both sure of another token: seen though no token is among the likeliest of both but by its absence.
    sure, other = {1: float(np.log(0.999)), 2: -7.0}, {3: float(np.log(0.999)), 4: -7.0}
    assert divergence(sure, {**other, 1: -12.0}) > 5


def test_divergence_sees_a_likely_token_that_the_other_does_not_list() -> None:
    reference = {1: float(np.log(0.9)), 2: float(np.log(0.1))}
    assert divergence(reference, {2: float(np.log(0.999))}) > 0.3


def test_common_prefix() -> None:
    assert common_prefix([1, 2, 3], [1, 2, 4, 5]) == 2
    assert common_prefix([1, 2], [1, 2, 3]) == 2
    assert common_prefix([], [1]) == 0


def test_means_of_parts_use_every_value_once() -> None:
    values = np.random.default_rng().standard_normal(37)
    means = means_of_parts(values.tolist(), 8)
    sizes = np.diff([37 * part // 8 for part in range(9)])
    assert float((np.array(means) * sizes).sum()) == pytest.approx(values.sum())
