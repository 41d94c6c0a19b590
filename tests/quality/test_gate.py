"""The gate: what passes, fails, and is not decided."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from vllm_sparse.quality.gate import Gate, Limits, Outcome, decide
from vllm_sparse.quality.records import DENSE, DecodingRecord, LanguageRecord, Record, TaskRecord
from vllm_sparse.quality.report.summary import summarise
from vllm_sparse.quality.report.terminal import gate_table
from vllm_sparse.quality.variants import Variant

PREFILL = Variant("p", {"sparse_prefill": "method"})
DECODE = Variant("d", {"sparse_decode": "method"})
LENGTH = 16384


def tasks(
    variant: str,
    lost: Sequence[int] = (),
    kinds: int = 6,
    documents: int = 10,
    prompts: int = 4,
    length: int = LENGTH,
    ability: float = 1.0,
) -> list[Record]:
    """Answers of dense and of a variant, which loses the numbered documents' first prompt of the first kind."""
    return [
        TaskRecord(
            variant=name,
            length_tokens=length,
            kind=f"kind {kind}",
            document=document,
            prompt=prompt,
            score=0.0 if name != DENSE and kind == prompt == 0 and document in lost else ability,
            text="",
            answers=(),
            prompt_tokens=length,
            depth=None,
            question="",
        )
        for name in (DENSE, variant)
        for kind in range(kinds)
        for document in range(documents)
        for prompt in range(prompts)
    ]


def language(variant: str, more: float, code: int = 8, prose: int = 8, length: int = LENGTH) -> list[Record]:
    return [
        LanguageRecord(name, length, kind, document, 1.0 + (more if name != DENSE else 0), ())
        for name in (DENSE, variant)
        for kind, count in (("code", code), ("prose", prose))
        for document in range(count)
    ]


def decoding(
    variant: str, divergence: float, same_first: float, tokens: int = 512, length: int = LENGTH
) -> list[Record]:
    return [
        DecodingRecord(variant, length, "code", document, divergence, same_first, (), tokens) for document in range(4)
    ]


def gate_of(records: Sequence[Record], *variants: Variant, limits: Limits | None = None) -> Gate:
    return decide(summarise(records, variants, {}), limits)


def outcomes(gate: Gate) -> dict[str, Outcome]:
    return {one.criterion: one.outcome for one in gate.decisions}


def test_a_variant_that_loses_nothing_passes() -> None:
    gate = gate_of([*tasks("p"), *language("p", 0.0)], PREFILL)
    assert outcomes(gate) == {"tasks": Outcome.PASSED, "language": Outcome.PASSED}
    assert gate.exit_status == 0


# 240 prompts: two lost are -0.0083, three -0.0125.
@pytest.mark.parametrize(("lost", "outcome"), [((0, 1), Outcome.PASSED), ((0, 1, 2), Outcome.FAILED)])
def test_the_mean_of_tasks(lost: Sequence[int], outcome: Outcome) -> None:
    gate = gate_of([*tasks("d", lost), *decoding("d", 0.0, 1.0)], DECODE)
    assert outcomes(gate)["tasks"] == outcome
    assert gate.exit_status == (0 if outcome == Outcome.PASSED else 1)


def test_the_limit_itself_passes() -> None:
    """Ten of a thousand: -0.01 but for rounding."""
    records = tasks("d", range(10), kinds=10, documents=25)
    gate = gate_of(records, DECODE, limits=Limits(criteria=("tasks",)))
    assert gate.exit_status == 0, gate.decisions
    assert gate_of(records, DECODE, limits=Limits(criteria=("tasks",), least_mean_difference=-0.0099)).exit_status == 1


def test_a_wide_interval_fails_though_the_mean_passes() -> None:
    records = [
        replace(one, score=0.25 if one.document == 0 else 1.0)
        if isinstance(one, TaskRecord) and one.variant == "d" and one.kind != "kind 5" and one.document in (0, 1)
        else replace(one, score=0.9)
        if isinstance(one, TaskRecord) and one.document >= 1 and one.variant == DENSE
        else one
        for one in tasks("d")
    ]
    whole = summarise(records, [DECODE], {}).cells[0].difference
    assert whole.mean is not None
    assert whole.mean > -0.01
    assert whole.interval is not None
    assert whole.interval[0] < -0.03
    assert gate_of(records, DECODE, limits=Limits(criteria=("tasks",))).exit_status == 1
    smaller = Limits(criteria=("tasks",), least_interval_end=-0.5)
    assert gate_of(records, DECODE, limits=smaller).exit_status == 0


@pytest.mark.parametrize(
    ("records", "said"),
    [
        (tasks("d", kinds=5), "5 kinds have 40 prompts, 6 are needed"),
        (tasks("d", prompts=3), "kind 0 30"),
        (tasks("d", documents=5, prompts=8), "5 documents, an interval needs 6"),
        (tasks("d", ability=0.05), "6 more cannot show a loss"),
    ],
)
def test_too_few_prompts_are_not_decided_however_good(records: Sequence[Record], said: str) -> None:
    gate = gate_of([*records, *decoding("d", 0.0, 1.0)], DECODE)
    assert outcomes(gate)["tasks"] == Outcome.TOO_FEW
    assert said in gate.decisions[0].found
    assert gate.exit_status == 3


def test_a_loss_beyond_doubt_fails_on_too_few_kinds() -> None:
    lost = gate_of([*tasks("d", range(10), kinds=3), *decoding("d", 0.0, 1.0)], DECODE)
    assert outcomes(lost)["tasks"] == Outcome.FAILED
    assert lost.exit_status == 1
    # One prompt of one document: the interval reaches up to nothing lost.
    doubtful = gate_of([*tasks("d", [0], kinds=3), *decoding("d", 0.0, 1.0)], DECODE)
    assert outcomes(doubtful)["tasks"] == Outcome.TOO_FEW


def test_a_smaller_gate_decides_with_fewer_and_says_so() -> None:
    records = tasks("d", kinds=3, prompts=2)
    limits = Limits(least_kinds=3, least_prompts_per_kind=20, criteria=("tasks",))
    gate = gate_of(records, DECODE, limits=limits)
    assert gate.exit_status == 0
    assert "on 3 kinds of 20 prompts" in gate_table(gate)
    assert "not the numbers that a method's defaults have to meet" in gate_table(gate)
    assert "not the numbers" not in gate_table(gate_of(records, DECODE))


@pytest.mark.parametrize(
    ("records", "outcome"),
    [
        (language("p", 0.005), Outcome.PASSED),
        (language("p", 0.0051), Outcome.FAILED),
        (language("p", 0.0, code=7), Outcome.TOO_FEW),
        (language("p", 0.0, code=16, prose=0), Outcome.TOO_FEW),
        ([], Outcome.NOT_MEASURED),
    ],
)
def test_language(records: Sequence[Record], outcome: Outcome) -> None:
    gate = gate_of([*tasks("p"), *records], PREFILL)
    assert outcomes(gate)["language"] == outcome
    assert gate.exit_status == {Outcome.PASSED: 0, Outcome.FAILED: 1}.get(outcome, 3)


@pytest.mark.parametrize(
    ("records", "outcome"),
    [
        (decoding("d", 0.02, 0.98), Outcome.PASSED),
        (decoding("d", 0.021, 1.0), Outcome.FAILED),
        (decoding("d", 0.0, 0.979), Outcome.FAILED),
        (decoding("d", 0.0, 1.0, tokens=511), Outcome.TOO_FEW),
        (decoding("d", 0.0, 1.0, length=8192), Outcome.NOT_MEASURED),
        ([], Outcome.NOT_MEASURED),
    ],
)
def test_decoding(records: Sequence[Record], outcome: Outcome) -> None:
    gate = gate_of([*tasks("d"), *records], DECODE)
    assert outcomes(gate)["decoding"] == outcome
    assert gate.exit_status == {Outcome.PASSED: 0, Outcome.FAILED: 1}.get(outcome, 3)


def test_each_phase_answers_for_what_it_can_change() -> None:
    both = Variant("both", {"sparse_preset": "fast"})
    gate = gate_of([*tasks("p"), *tasks("d"), *tasks("both")], PREFILL, DECODE, both)
    judged = {(one.variant, one.criterion) for one in gate.decisions}
    assert judged == {
        ("p", "tasks"),
        ("p", "language"),
        ("d", "tasks"),
        ("d", "decoding"),
        ("both", "tasks"),
        ("both", "language"),
        ("both", "decoding"),
    }


def test_a_length_that_lacks_a_measure_is_not_passed_over() -> None:
    records = [*tasks("p"), *language("p", 0.0), *tasks("p", length=8192)]
    gate = gate_of(records, PREFILL)
    missing = [one for one in gate.decisions if one.outcome == Outcome.NOT_MEASURED]
    assert [(one.length_tokens, one.criterion) for one in missing] == [(8192, "language")]
    assert gate.exit_status == 3


def test_one_that_failed_outweighs_one_that_is_not_decided() -> None:
    gate = gate_of([*tasks("p"), *language("p", 1.0), *tasks("d")], PREFILL, DECODE)
    assert gate.outcome_of("p") == Outcome.FAILED
    assert gate.outcome_of("d") == Outcome.NOT_MEASURED
    assert gate.exit_status == 1


def test_baselines_are_not_judged_and_nothing_is_not_a_pass() -> None:
    random = Variant("random", {"sparse_prefill": "random"}, "random")
    gate = gate_of(tasks("random"), random)
    assert gate.decisions == ()
    assert gate.exit_status == 3
    assert gate_of([], PREFILL).exit_status == 3
