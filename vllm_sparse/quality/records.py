"""What is measured, one record a line of the journal; the report is made of nothing else.

Records of one prompt under different variants have equal `length_tokens`, `kind`, `document` and `prompt`: they are the
pairs of every comparison.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

DENSE = "dense"
"""Name of the variant that all others are compared with."""


@dataclass(frozen=True)
class TaskRecord:
    """An answer.

    Attributes:
        variant: which settings answered.
        length_tokens: the length asked for, of prompt and answer together.
        kind: of the task.
        document: the text that the question is about; a number that follows from the seed.
        prompt: number of the question among those of its kind about the document.
        score: 0 to 1.
        text: what the model said.
        answers: what it should have said.
        prompt_tokens: of the prompt.
        depth: as of `Task`.
        question: the end of the prompt, for people.
    """

    variant: str
    length_tokens: int
    kind: str
    document: int
    prompt: int
    score: float
    text: str
    answers: tuple[str, ...]
    prompt_tokens: int
    depth: float | None
    question: str
    measure: Literal["task"] = "task"


@dataclass(frozen=True)
class LanguageRecord:
    """How well a real text is predicted by a prefill.

    Attributes:
        variant, length_tokens, document: as of `TaskRecord`.
        kind: ``code`` or ``prose``.
        mean_loss: mean -log p of the tokens of the text's last half, in nats.
        loss_by_position: mean -log p of each sixteenth of the text.
    """

    variant: str
    length_tokens: int
    kind: str
    document: int
    mean_loss: float
    loss_by_position: tuple[float, ...]
    measure: Literal["language"] = "language"


@dataclass(frozen=True)
class DecodingRecord:
    """Next tokens of a variant that is told, token by token, what dense decoding said.

    Attributes:
        variant, length_tokens, kind, document: as of `LanguageRecord`.
        mean_divergence: mean KL divergence from the dense distribution over the generated positions, in nats.
        same_first: share of the positions at which the most likely token is the dense one.
        divergence_by_position: mean of each eighth of the positions.
        tokens: positions.
    """

    variant: str
    length_tokens: int
    kind: str
    document: int
    mean_divergence: float
    same_first: float
    divergence_by_position: tuple[float, ...]
    tokens: int
    measure: Literal["decoding"] = "decoding"


@dataclass(frozen=True)
class GenerationRecord:
    """A free generation.

    Attributes:
        variant, length_tokens, document: as of `TaskRecord`.
        kind: what was asked for.
        tokens: generated.
        common_prefix_tokens: tokens before the first that differs from the dense generation's.
        score: 0 to 1, of what was asked for while generating.
        score_by_part: the score of each quarter of what was asked for, in order.
        text: what was generated.
        agreement: share of its tokens that dense would have said, given what stands before them; None in journals of
            earlier versions, as the following ones.
        agreement_by_part: the agreement of each quarter of its tokens; none of fewer than four.
        mean_loss: mean -log p of its tokens under dense, given what stands before them, in nats.
        repeated: share of its runs of 16 tokens that it said before.
    """

    variant: str
    length_tokens: int
    kind: str
    document: int
    tokens: int
    common_prefix_tokens: int
    score: float
    score_by_part: tuple[float, ...]
    text: str
    agreement: float | None = None
    agreement_by_part: tuple[float, ...] = ()
    mean_loss: float | None = None
    repeated: float | None = None
    measure: Literal["generation"] = "generation"


@dataclass(frozen=True)
class RecallRecord:
    """Attention mass that a variant keeps of a real text, in each layer and query head.

    Attributes:
        variant, length_tokens, kind, document: as of `LanguageRecord`.
        phase: ``prefill`` or ``decode``.
        recall: of each layer, of each query head: mass kept, mean over queries; a layer that is dense has ones.
        best: likewise, of the best list of equal length.
        density: of each layer: tokens read over tokens in reach, mean over heads.
    """

    variant: str
    length_tokens: int
    kind: str
    document: int
    phase: Literal["prefill", "decode"]
    recall: tuple[tuple[float, ...], ...]
    best: tuple[tuple[float, ...], ...]
    density: tuple[float, ...]
    measure: Literal["recall"] = "recall"


@dataclass(frozen=True)
class SpeedRecord:
    """A request alone on the server.

    Attributes:
        variant, length_tokens: as of `TaskRecord`.
        repeat: its number; equal numbers are the same prompt.
        ttft_s: seconds to the first token.
        tpot_s: mean seconds between the tokens that follow.
        prefill_density: tokens read over tokens in reach, of the prompt's sparse chunks; None if none was sparse.
        decode_density: likewise, of decode steps.
    """

    variant: str
    length_tokens: int
    repeat: int
    ttft_s: float
    tpot_s: float
    prefill_density: float | None
    decode_density: float | None
    measure: Literal["speed"] = "speed"


Record = TaskRecord | LanguageRecord | DecodingRecord | GenerationRecord | RecallRecord | SpeedRecord
