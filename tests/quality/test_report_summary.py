"""Cells, pairs and baselines of equal density."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.quality.report_records import VARIANTS, fake_records
from vllm_sparse.quality.records import DENSE, LanguageRecord, Record, SpeedRecord, TaskRecord
from vllm_sparse.quality.report.results import ALL_KINDS, Summary
from vllm_sparse.quality.report.summary import summarise
from vllm_sparse.quality.variants import Variant

SPARSE = Variant("sparse", {"sparse_prefill": "method"})


def answer(variant: str, score: float, document: int = 0, kind: str = "a", prompt: int = 0) -> TaskRecord:
    return TaskRecord(variant, 1024, kind, document, prompt, score, "", (), 1000, None, "")


def speed(variant: str, density: float | None, ttft_s: float = 1.0) -> SpeedRecord:
    return SpeedRecord(variant, 1024, 0, ttft_s, 0.01, density, None)


def baselines(*densities: float, kind: str = "random") -> list[Variant]:
    return [Variant(f"{kind} {density}", {"sparse_prefill": kind}, kind) for density in densities]


def summary_of(records: Sequence[Record], *variants: Variant) -> Summary:
    return summarise(records, variants, {})


def test_a_kind_with_many_prompts_weighs_no_more_than_one_with_few() -> None:
    records: list[Record] = []
    for document in range(6):
        for kind, prompts, score in (("a", 5, 0.0), ("b", 1, 1.0)):
            for prompt in range(prompts):
                records.append(answer(DENSE, 1.0, document, kind, prompt))
                records.append(answer("sparse", score, document, kind, prompt))
    whole, first, second = summary_of(records, SPARSE).cells
    assert (whole.kind, whole.kinds, whole.difference.pairs) == (ALL_KINDS, 2, 36)
    assert whole.difference.mean == pytest.approx(-0.5)
    assert (whole.dense_mean, whole.variant_mean) == (1.0, 0.5)
    assert (first.difference.mean, second.difference.mean) == pytest.approx((-1.0, 0.0))


def test_only_prompts_that_both_answered_count_and_the_rest_is_said() -> None:
    records = [answer(DENSE, 1.0), answer("sparse", 0.0), answer("sparse", 1.0, 1), answer(DENSE, 1.0, 2)]
    found = summary_of(records, SPARSE)
    assert found.cells[0].difference.pairs == 1
    assert any("1 answers have no dense one and 1 dense answers" in note for note in found.notes)


def test_a_repeated_record_counts_once_and_it_is_said() -> None:
    found = summary_of([answer(DENSE, 1.0), answer("sparse", 0.0), answer("sparse", 1.0)], SPARSE)
    assert found.cells[0].difference.mean == 0.0
    assert found.cells[0].difference.pairs == 1
    assert any("repeat an earlier one" in note for note in found.notes)


def test_a_record_of_an_unknown_variant_is_refused() -> None:
    with pytest.raises(ValueError, match="other"):
        summary_of([answer("other", 1.0)], SPARSE)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_is_refused(value: float) -> None:
    """An infinite loss must not be left out of a mean, which would make the variant look better."""
    for record in (LanguageRecord("sparse", 1024, "code", 0, value, ()), answer("sparse", value)):
        with pytest.raises(ValueError, match="not finite"):
            summary_of([record], SPARSE)


@given(st.floats(0.2, 1.0), st.integers(0, 2**32 - 1))
def test_between_two_settings_a_baseline_is_interpolated_prompt_by_prompt(density: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    random = baselines(0.2, 0.6)
    scores = {name: rng.random(8) for name in (DENSE, "sparse", *(one.name for one in random))}
    records: list[Record] = [
        answer(name, float(score), document) for name, some in scores.items() for document, score in enumerate(some)
    ]
    records += [speed("sparse", density), *(speed(one.name, float(one.name.split()[1])) for one in random)]
    found = summary_of(records, SPARSE, *random)
    one = next(one for one in found.equal_density if one.baseline == "random")
    at = [
        np.interp(density, [0.2, 0.6, 1.0], [scores["random 0.2"][i], scores["random 0.6"][i], scores[DENSE][i]])
        for i in range(8)
    ]
    assert one.advantage.mean == pytest.approx(np.mean(scores["sparse"] - at))
    assert one.advantage.pairs == 8
    assert not one.below_lowest


def test_below_the_lowest_setting_the_lowest_is_used_and_it_is_said() -> None:
    random = baselines(0.2)
    records: list[Record] = [answer(name, 0.5, document) for name in (DENSE, "random 0.2") for document in range(6)]
    records += [answer("sparse", 1.0, document) for document in range(6)]
    records += [speed("sparse", 0.1), speed("random 0.2", 0.2)]
    one = next(one for one in summary_of(records, SPARSE, *random).equal_density if one.baseline == "random")
    assert one.below_lowest
    assert (one.lower, one.upper) == ("random 0.2", "random 0.2")
    assert one.verdict == "better than random"


@pytest.mark.parametrize(
    ("documents", "won", "verdict"),
    [
        (6, 6, "better than random"),
        (6, 1, "not shown to be better than random"),
        (6, 0, "not shown to be better than random"),
        (5, 5, "not shown to be better than random (fewer than 6 documents)"),
    ],
)
def test_what_does_not_beat_random_is_named(documents: int, won: int, verdict: str) -> None:
    random = baselines(0.2)
    records: list[Record] = [speed("sparse", 0.2), speed("random 0.2", 0.2)]
    for document in range(documents):
        records += [answer(DENSE, 1.0, document), answer("random 0.2", 0.5, document)]
        records.append(answer("sparse", 1.0 if document < won else 0.5, document))
    one = next(one for one in summary_of(records, SPARSE, *random).equal_density if one.baseline == "random")
    assert one.verdict == verdict


def test_a_baseline_that_is_missing_or_sparse_in_both_phases_is_no_comparison() -> None:
    both = Variant("random both", {"sparse_prefill": "random", "sparse_decode": "random"}, "random")
    records: list[Record] = [answer(DENSE, 1.0), answer("sparse", 1.0), answer("random both", 0.0)]
    records += [speed("sparse", 0.2), speed("random both", 0.2)]
    found = summary_of(records, SPARSE, both)
    assert {one.verdict for one in found.equal_density} == {
        "random not measured",
        "streaming not measured",
        "oracle not measured",
    }
    assert any("random both: sparse in both phases" in note for note in found.notes)
    unknown = summary_of([one for one in records if one.measure == "task"], SPARSE, both)
    assert {one.verdict for one in unknown.equal_density} == {"density of sparse not measured"}


def test_without_dense_nothing_above_the_highest_setting_is_made_up() -> None:
    random = baselines(0.2)
    records: list[Record] = [answer("sparse", 1.0), answer("random 0.2", 0.0)]
    records += [speed("sparse", 0.5), speed("random 0.2", 0.2)]
    one = next(one for one in summary_of(records, SPARSE, *random).equal_density if one.baseline == "random")
    assert one.advantage.pairs == 0
    assert "dense was not measured" in one.verdict


def test_a_kind_that_dense_cannot_answer_is_marked_and_stays() -> None:
    records: list[Record] = []
    for kind, score in (("a", 1.0), ("b", 0.05)):
        records += [answer(DENSE, score, document, kind) for document in range(6)]
        records += [answer("sparse", score, document, kind) for document in range(6)]
    found = summary_of(records, SPARSE)
    assert [(one.kind, one.dense_too_low) for one in found.cells] == [(ALL_KINDS, False), ("a", False), ("b", True)]
    assert found.cells[0].difference.pairs == 12
    assert any(note.startswith("b at 1024 tokens: dense scores below 0.1") for note in found.notes)


def test_a_speed_ratio_is_the_median_of_pairs() -> None:
    records = [
        replace(speed(name, density), repeat=repeat, ttft_s=seconds)
        for name, density, times in ((DENSE, None, (1.0, 10.0, 2.0)), ("sparse", 0.3, (0.5, 6.0, 3.0)))
        for repeat, seconds in enumerate(times)
    ]
    _, one = summary_of(records, SPARSE).speed
    assert one.ttft_ratio == pytest.approx(0.6)
    assert one.prefill_density == pytest.approx(0.3)
    assert one.decode_density is None


def test_everything_of_a_whole_run(generator: torch.Generator) -> None:
    rng = np.random.default_rng(generator.initial_seed())
    records = fake_records(rng, kinds=("one_needle", "counting"), lengths=(32768,), documents=6, prompts=2)
    found = summarise(records, VARIANTS, {"model": "fake"})
    assert not found.not_measured
    assert {one.variant for one in found.recall} == {one.name for one in VARIANTS}
    recall = found.recall[0]
    assert [head.recall for head in recall.worst] == sorted(value for row in recall.recall for value in row)[:10]
    assert all(len(one.difference) == 16 for one in found.positions)
    assert all(len(one.divergence_by_position) == 8 for one in found.decoding)
    depth_pairs = sum(one.pairs for one in found.depths if one.variant == "tidal")
    assert depth_pairs == 2 * 6 * 2
    assert all(one.score < one.dense_score for one in found.worst)
    assert {one.variant for one in found.worst} <= {one.name for one in VARIANTS if not one.baseline}
    methods = [one for one in found.cells if one.kind == ALL_KINDS and one.variant == "tidal"]
    assert all(one.holm_p is not None and one.difference.p is not None for one in methods)


def test_zero_records() -> None:
    found = summarise([], [SPARSE], {})
    assert found.cells == ()
    assert found.not_measured == ("task", "language", "decoding", "generation", "recall", "speed")
