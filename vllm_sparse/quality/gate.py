"""Whether variants are as good as dense: thresholds, what each needs to be decided, and the exit status."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Literal

from vllm_sparse.quality.report.results import ALL_KINDS, Cell, Decoding, Summary
from vllm_sparse.quality.statistics import LEAST_DOCUMENTS
from vllm_sparse.quality.variants import Variant

LEAST_MEAN_SCORE_DIFFERENCE = -0.01
LEAST_INTERVAL_END = -0.03
LEAST_KINDS = 6
LEAST_PROMPTS_PER_KIND = 40
MOST_LOSS_DIFFERENCE_NATS = 0.005
LEAST_TEXTS = 16
TEXT_KINDS = ("code", "prose")
MOST_DIVERGENCE_NATS = 0.02
LEAST_SAME_FIRST = 0.98
LEAST_DECODING_TOKENS = 512
DECODING_LENGTHS_TOKENS = (16_000, 32_768)

_ROUNDING = 1e-9

Criterion = Literal["tasks", "language", "decoding"]
CRITERIA: tuple[Criterion, ...] = ("tasks", "language", "decoding")


class Outcome(Enum):
    """Of a criterion, or of all."""

    PASSED = "passed"
    FAILED = "failed"
    NOT_MEASURED = "not measured"
    TOO_FEW = "too few prompts"


@dataclass(frozen=True)
class Limits:
    """The numbers that a gate is decided with; the defaults are the gate for a method's defaults and for presets.

    Attributes:
        least_mean_difference: of the mean score, variant minus dense, all kinds of task together.
        least_interval_end: lower end of that difference's 95 % interval.
        least_kinds, least_prompts_per_kind: so many kinds of task with so many pairs each decide that tasks pass; a
            kind in which dense scores too low to show a loss does not count. A loss whose whole interval lies beyond
            `least_mean_difference` fails on fewer.
        most_loss_difference_nats: of the mean -log p of the last half of texts, variant minus dense.
        least_texts: so many texts decide, of code and of prose together, with some of either.
        most_divergence_nats: mean KL to dense, told the dense history.
        least_same_first: share of positions with the dense most likely token.
        least_decoding_tokens: positions of every text.
        decoding_lengths_tokens: shortest and longest context at which decoding is judged.
        criteria: what is judged.
    """

    least_mean_difference: float = LEAST_MEAN_SCORE_DIFFERENCE
    least_interval_end: float = LEAST_INTERVAL_END
    least_kinds: int = LEAST_KINDS
    least_prompts_per_kind: int = LEAST_PROMPTS_PER_KIND
    most_loss_difference_nats: float = MOST_LOSS_DIFFERENCE_NATS
    least_texts: int = LEAST_TEXTS
    most_divergence_nats: float = MOST_DIVERGENCE_NATS
    least_same_first: float = LEAST_SAME_FIRST
    least_decoding_tokens: int = LEAST_DECODING_TOKENS
    decoding_lengths_tokens: tuple[int, int] = DECODING_LENGTHS_TOKENS
    criteria: tuple[Criterion, ...] = CRITERIA


@dataclass(frozen=True)
class Decision:
    """One criterion of one variant at one length.

    Attributes:
        length_tokens: None where no length was measured.
        found: the numbers that decided it, or what is missing, in words.
    """

    variant: str
    length_tokens: int | None
    criterion: Criterion
    outcome: Outcome
    found: str


@dataclass(frozen=True)
class Gate:
    """What was decided, and with which numbers."""

    limits: Limits
    decisions: tuple[Decision, ...]

    def outcome_of(self, variant: str) -> Outcome:
        """A variant passes when all of its criteria do; one that failed outweighs one that is not decided."""
        return _whole([one.outcome for one in self.decisions if one.variant == variant])

    @property
    def outcome(self) -> Outcome:
        """Of all variants together."""
        return _whole([one.outcome for one in self.decisions])

    @property
    def exit_status(self) -> int:
        """0: all passed; 1: something failed; 3: undecided, because too little was measured or nothing."""
        return {Outcome.PASSED: 0, Outcome.FAILED: 1}.get(self.outcome, 3)


def _whole(outcomes: Sequence[Outcome]) -> Outcome:
    for worst in (Outcome.FAILED, Outcome.TOO_FEW, Outcome.NOT_MEASURED):
        if worst in outcomes:
            return worst
    return Outcome.PASSED if outcomes else Outcome.NOT_MEASURED


def decide(summary: Summary, limits: Limits | None = None) -> Gate:
    """Hold every variant that is no baseline against the gate.

    Tasks and language are judged at every length at which either was measured with any variant, so that what one
    variant lacks shows. Language applies to variants with sparse prefill, decoding to those with sparse decode.
    """
    limits = limits or Limits()
    judged = [one for one in summary.variants if not one.baseline]
    whole = [one for one in summary.cells if one.kind == ALL_KINDS]
    lengths: Sequence[int | None] = sorted({one.length_tokens for one in whole})
    decisions: list[Decision] = []
    for variant in judged:
        for length in lengths or (None,):
            own = [one for one in summary.cells if (one.variant, one.length_tokens) == (variant.name, length)]
            if "tasks" in limits.criteria:
                cells = [one for one in own if one.measure == "tasks"]
                decisions.append(Decision(variant.name, length, "tasks", *_tasks(cells, limits)))
            if "language" in limits.criteria and variant.sparse_prefill:
                cells = [one for one in own if one.measure == "language"]
                decisions.append(Decision(variant.name, length, "language", *_language(cells, limits)))
        if "decoding" in limits.criteria and variant.sparse_decode:
            decisions += _decoding(summary, variant, limits)
    return Gate(limits, tuple(decisions))


def _tasks(cells: Sequence[Cell], limits: Limits) -> tuple[Outcome, str]:
    whole = next((one for one in cells if one.kind == ALL_KINDS), None)
    if whole is None or whole.difference.mean is None:
        return Outcome.NOT_MEASURED, "no task was answered by both"
    kinds = [one for one in cells if one.kind != ALL_KINDS]
    able = [one for one in kinds if not one.dense_too_low]
    enough = [one for one in able if one.difference.pairs >= limits.least_prompts_per_kind]
    mean, difference, interval = whole.difference.mean, whole.difference, whole.difference.interval
    if len(enough) < limits.least_kinds:
        # Too few kinds to show that nothing is lost, not too few to show that something is.
        if interval is not None and interval[1] < limits.least_mean_difference:
            return Outcome.FAILED, (
                f"score {mean:+.3f} (at least {limits.least_mean_difference:+g}), all of its interval "
                f"[{interval[0]:+.3f}, {interval[1]:+.3f}] below that, {difference.pairs} prompts"
            )
        idle = len(kinds) - len(able)
        left_out = f"; {idle} more cannot show a loss" if idle else ""
        return Outcome.TOO_FEW, (
            f"{len(enough)} kinds have {limits.least_prompts_per_kind} prompts, {limits.least_kinds} are needed "
            f"({', '.join(f'{one.kind} {one.difference.pairs}' for one in able) or 'none'}{left_out})"
        )
    if interval is None:
        return Outcome.TOO_FEW, (
            f"{difference.documents} documents, an interval needs {LEAST_DOCUMENTS} (mean {mean:+.3f})"
        )
    low, high = interval
    passed = _at_least(mean, limits.least_mean_difference) and _at_least(low, limits.least_interval_end)
    return _passed(passed), (
        f"score {mean:+.3f} (at least {limits.least_mean_difference:+g}), interval [{low:+.3f}, {high:+.3f}] "
        f"(from at least {limits.least_interval_end:+g}), {len(enough)} kinds, {difference.pairs} prompts"
    )


def _language(cells: Sequence[Cell], limits: Limits) -> tuple[Outcome, str]:
    whole = next((one for one in cells if one.kind == ALL_KINDS), None)
    if whole is None or whole.difference.mean is None:
        return Outcome.NOT_MEASURED, "no text was measured with both"
    texts = {kind: sum(one.difference.pairs for one in cells if one.kind == kind) for kind in TEXT_KINDS}
    have = " and ".join(f"{count} of {kind}" for kind, count in texts.items())
    if sum(texts.values()) < limits.least_texts or not all(texts.values()):
        return Outcome.TOO_FEW, f"{have}; {limits.least_texts} texts are needed, some of either"
    mean = whole.difference.mean
    return _passed(_at_least(limits.most_loss_difference_nats, mean)), (
        f"loss {mean:+.4f} nats (at most {limits.most_loss_difference_nats:+g}), {have}"
    )


def _decoding(summary: Summary, variant: Variant, limits: Limits) -> list[Decision]:
    least, most = limits.decoding_lengths_tokens
    judged = sorted({one.length_tokens for one in summary.decoding if least <= one.length_tokens <= most})
    if not judged:
        found = f"no length of {least} to {most} tokens was measured"
        return [Decision(variant.name, None, "decoding", Outcome.NOT_MEASURED, found)]
    own = {one.length_tokens: one for one in summary.decoding if one.variant == variant.name}
    return [Decision(variant.name, one, "decoding", *_divergence(own.get(one), limits)) for one in judged]


def _divergence(found: Decoding | None, limits: Limits) -> tuple[Outcome, str]:
    if found is None or found.divergence.mean is None:
        return Outcome.NOT_MEASURED, "no text was decoded"
    if found.least_tokens < limits.least_decoding_tokens:
        return Outcome.TOO_FEW, f"{found.least_tokens} tokens of a text, {limits.least_decoding_tokens} are needed"
    mean, same = found.divergence.mean, found.same_first
    passed = _at_least(limits.most_divergence_nats, mean) and _at_least(same, limits.least_same_first)
    return _passed(passed), (
        f"KL {mean:.4f} nats (at most {limits.most_divergence_nats:g}), same first token {same:.2%} "
        f"(at least {limits.least_same_first:.0%}), {found.texts} texts of {found.least_tokens} tokens or more"
    )


def _passed(passed: bool) -> Outcome:
    return Outcome.PASSED if passed else Outcome.FAILED


def _at_least(value: float, limit: float) -> bool:
    # Ten means of one in ten lost are -0.01 but for rounding.
    return value >= limit - _ROUNDING
