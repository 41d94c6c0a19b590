"""What a report says, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from vllm_sparse.quality.statistics import LEAST_DOCUMENTS, SIGNIFICANT, Estimate
from vllm_sparse.quality.variants import Variant

ALL_KINDS = ""
LEAST_DENSE_SCORE = 0.1
"""A kind that dense answers worse than this at a length has nothing to lose there."""
DEPTHS = 5

Measure = Literal["tasks", "language", "decoding"]
Phase = Literal["prefill", "decode"]
PHASES: tuple[Phase, ...] = ("prefill", "decode")
BASELINES = ("random", "streaming", "oracle")


@dataclass(frozen=True)
class Cell:
    """A variant against dense, over prompts that both answered.

    Attributes:
        variant, length_tokens: as of the records.
        measure: ``tasks`` (score, 0 to 1) or ``language`` (mean -log p of the last half, nats).
        kind: of task or text; `ALL_KINDS` for all together, where each kind of task and each text weighs equally.
        kinds: how many kinds it holds.
        dense_mean, variant_mean: over the paired prompts.
        difference: variant minus dense.
        holm_p: p adjusted over the table: cells of the same measure, all of one kind each or all of all kinds, methods
            and baselines apart.
        dense_too_low: dense scores below `LEAST_DENSE_SCORE`, so that the cell cannot show a loss.
        prefill_density, decode_density: tokens read over tokens in reach; None if not measured or not sparse.
    """

    variant: str
    length_tokens: int
    measure: Measure
    kind: str
    kinds: int
    dense_mean: float | None
    variant_mean: float | None
    difference: Estimate
    dense_too_low: bool
    prefill_density: float | None
    decode_density: float | None
    holm_p: float | None = None

    @property
    def significant(self) -> bool | None:
        """Whether the adjusted p-value is below 5 %; None where there is none."""
        return None if self.holm_p is None else self.holm_p < SIGNIFICANT


@dataclass(frozen=True)
class EqualDensity:
    """A variant against a baseline that reads as much, prompt by prompt.

    Attributes:
        variant, length_tokens, measure: as of `Cell`.
        phase: whose density is equal.
        baseline: its kind.
        density: of the variant in that phase; None if not measured.
        lower, upper: the settings of the baseline between which its value is interpolated; equal if only one is used.
        below_lowest: the variant reads less than any setting of the baseline, whose lowest is used as it is.
        advantage: how much better the variant is: score minus the baseline's, or the baseline's loss or divergence
            minus the variant's.
        missing: why there is no comparison, or "".
    """

    variant: str
    length_tokens: int
    measure: Measure
    phase: Phase
    baseline: str
    density: float | None
    lower: str
    upper: str
    below_lowest: bool
    advantage: Estimate
    missing: str

    @property
    def shown(self) -> bool:
        """The variant is better than the baseline, and the interval says so."""
        return self.advantage.interval is not None and self.advantage.interval[0] > 0

    @property
    def verdict(self) -> str:
        """In words; an oracle is a bound, which nobody has to beat."""
        if self.baseline == "oracle" and not self.missing:
            return ""
        if self.missing:
            return self.missing
        if self.advantage.interval is None:
            return f"not shown to be better than {self.baseline} (fewer than {LEAST_DOCUMENTS} documents)"
        return f"{'' if self.shown else 'not shown to be '}better than {self.baseline}"


@dataclass(frozen=True)
class Depth:
    """Score minus dense of the questions whose answer stands in one part of the text.

    Attributes:
        part: of `DEPTHS` equal parts, 0 at the beginning.
        pairs: prompts; difference is None without any.
    """

    variant: str
    length_tokens: int
    part: int
    pairs: int
    difference: float | None


@dataclass(frozen=True)
class Positions:
    """Loss minus dense along the texts of a length, nats; the mean over texts at each sixteenth."""

    variant: str
    length_tokens: int
    texts: int
    difference: tuple[float, ...]


@dataclass(frozen=True)
class Decoding:
    """Told the dense history.

    Attributes:
        texts: measured.
        least_tokens: positions of the shortest.
        divergence: mean KL to dense, nats, with the interval over texts.
        same_first: share of positions with the same most likely token.
        divergence_by_position: mean of each eighth.
    """

    variant: str
    length_tokens: int
    texts: int
    least_tokens: int
    divergence: Estimate
    same_first: float
    divergence_by_position: tuple[float, ...]


@dataclass(frozen=True)
class Generation:
    """Free generations.

    Attributes:
        kind: what was asked for.
        median_tokens, median_prefix_tokens: generated, and before the first that differs from dense.
        dense_score, score: means of the whole score.
        difference: of the whole score, against dense.
        difference_by_part: of each quarter of what was asked for.
        agreement: difference of the share of tokens that dense would have said, given what the variant said before,
            against that of dense's own; without pairs where journals of earlier versions have none, as the following.
        agreement_by_part: of each quarter of the tokens.
        loss: difference of the mean -log p under dense, in nats.
        dense_repeated, repeated: mean shares of runs of tokens that were said before.
    """

    variant: str
    length_tokens: int
    kind: str
    median_tokens: float
    median_prefix_tokens: float
    dense_score: float
    score: float
    difference: Estimate
    difference_by_part: tuple[float, ...]
    agreement: Estimate
    agreement_by_part: tuple[float, ...]
    loss: Estimate
    dense_repeated: float | None
    repeated: float | None


@dataclass(frozen=True)
class Head:
    """A query head, its recall and that of the best list of equal length."""

    layer: int
    head: int
    recall: float
    best: float


@dataclass(frozen=True)
class Recall:
    """Attention mass kept, mean over texts.

    Attributes:
        texts: measured.
        recall, best: of each layer, of each query head.
        density: of each layer.
        mean, best_mean: over layers and heads.
        worst: the heads that keep least, worst first.
    """

    variant: str
    length_tokens: int
    phase: Phase
    texts: int
    recall: tuple[tuple[float, ...], ...]
    best: tuple[tuple[float, ...], ...]
    density: tuple[float, ...]
    mean: float
    best_mean: float
    worst: tuple[Head, ...]


@dataclass(frozen=True)
class Speed:
    """Requests alone on the server.

    Attributes:
        repeats: measured, of the variant.
        ttft_s, tpot_s: medians.
        ttft_ratio, tpot_ratio: median over repeats of the variant's time over dense's of the same repeat; below 1 is
            faster; None without dense.
        prefill_density, decode_density: means.
    """

    variant: str
    length_tokens: int
    repeats: int
    ttft_s: float
    tpot_s: float
    ttft_ratio: float | None
    tpot_ratio: float | None
    prefill_density: float | None
    decode_density: float | None


@dataclass(frozen=True)
class WorstPrompt:
    """A question on which a variant lost against dense."""

    variant: str
    length_tokens: int
    kind: str
    document: int
    prompt: int
    depth: float | None
    question: str
    answers: tuple[str, ...]
    dense_score: float
    score: float
    dense_text: str
    text: str


@dataclass(frozen=True)
class Summary:
    """All that a report says.

    Attributes:
        facts: of the run, such as the model and the seed.
        variants: compared, without dense.
        notes: what a reader has to know to read the numbers.
        not_measured: measures without any record.
    """

    facts: Mapping[str, str]
    variants: tuple[Variant, ...]
    cells: tuple[Cell, ...]
    equal_density: tuple[EqualDensity, ...]
    depths: tuple[Depth, ...]
    positions: tuple[Positions, ...]
    decoding: tuple[Decoding, ...]
    generations: tuple[Generation, ...]
    recall: tuple[Recall, ...]
    speed: tuple[Speed, ...]
    worst: tuple[WorstPrompt, ...]
    notes: tuple[str, ...]
    not_measured: tuple[str, ...]


def density_of(speed: Speed | None, phase: Phase) -> float | None:
    """Tokens read over tokens in reach, in a phase; None if not measured."""
    return None if speed is None else speed.prefill_density if phase == "prefill" else speed.decode_density


def is_sparse(variant: Variant, phase: Phase) -> bool:
    """Whether the phase of a request with these settings is sparse."""
    return variant.sparse_prefill if phase == "prefill" else variant.sparse_decode
