"""Why a row that asked for a sparse method runs dense: the one place that decides it.

The device decides the same of decode rows that are served at once (`vllm_sparse.kernels.decode_roles`), from the number
that `longest_dense_seq_len` gives and from the order of the rows; `tests/step/test_eligibility.py` compares the two.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from vllm_sparse.methods.decode import BatchDecodeMethod, DecodeMethod
    from vllm_sparse.methods.prefill import PrefillMethod
    from vllm_sparse.step.costs import StepCosts


class DenseReason(StrEnum):
    """Why a row runs dense; the value is the metric's label.

    Attributes:
        sentence: for the log, after "a request ran a step dense:".
    """

    sentence: str

    SHORT_CONTEXT = (
        "short_context",
        "its context is shorter than sparse_min_tokens or just as long, or no longer than what the method reads",
    )
    SHORT_PROMPT_CHUNK = (
        "short_chunk",
        "the prompt chunk holds fewer tokens from sparse_min_tokens on than the method needs",
    )
    NO_ROOM = "no_room", "other requests of the step left no room to score its cached tokens"
    SPECULATIVE = "speculative", "verification steps of speculative decoding are not supported yet"
    LOW_RECALL = (
        "low_recall",
        "at least one of its layers, because lists kept less of the attention mass there than its sparse_min_recall",
    )
    SOFT_CAP = "soft_cap", "the method weighs attention masses, which this model's soft cap on logits changes"
    UNPROFITABLE = "unprofitable", "it would take longer sparse, by what the GPU's costs predict"
    TOO_EXPENSIVE = (
        "too_expensive",
        "it would take longer sparse than this server's prompt_cost allows, by what the GPU's costs predict, and the "
        "request asks for sparse_unprofitable 'sparse'",
    )

    def __new__(cls, value: str, sentence: str) -> DenseReason:
        """A member."""
        reason = str.__new__(cls, value)
        reason._value_ = value
        reason.sentence = sentence
        return reason


@dataclass
class ScoringRoom:
    """Room to score cached tokens of decode rows that are served at once, given to the rows in their order.

    Attributes:
        left_tokens: tokens that there is still room for; negative from the first row on that found too little.
    """

    left_tokens: int

    def take(self, tokens: int) -> bool:
        """Give room to a row. Rows behind one that found too little would fit only by chance, and get none."""
        self.left_tokens -= tokens
        return self.left_tokens >= 0


def dense_first_tokens(min_tokens: int, query_tokens: int, seq_len: int) -> int:
    """First tokens of a prompt chunk that run dense because they lie before `min_tokens`, however long the prompt is.

    So what a token's keys and values come from is told by its position, not by where the scheduler cuts the prompt, and
    blocks of the KV cache before `min_tokens` are shared with dense requests.

    Args:
        min_tokens: the request's ``sparse_min_tokens``.
        query_tokens: tokens of the prompt chunk.
        seq_len: tokens in the request's cache, this step's included.
    """
    return min(max(min_tokens - (seq_len - query_tokens), 0), query_tokens)


def why_prefill_is_dense(
    method: PrefillMethod,
    min_tokens: int,
    query_tokens: int,
    seq_len: int,
    has_sparse_layers: bool = True,
    costs: StepCosts | None = None,
    most_cost: float | None = None,
    soft_cap: bool = False,
) -> DenseReason | None:
    """Why a prompt chunk runs dense; None if it is sparse, but for its first tokens (`dense_first_tokens`).

    Args:
        method: of the request's prompt.
        min_tokens: the request's ``sparse_min_tokens``.
        query_tokens: tokens of the prompt chunk.
        seq_len: tokens in the request's cache, this step's included.
        has_sparse_layers: the guard has not sent all of the method's sparse layers dense.
        costs: of the server's GPU; None: nothing is known.
        most_cost: the longest that the chunk may take, in times of a dense one, where the request is to be sparse
            whether or not it pays; None: it is not.
        soft_cap: the model caps its attention logits.
    """
    if soft_cap and method.weighs_masses:
        return DenseReason.SOFT_CAP
    query_tokens -= dense_first_tokens(min_tokens, query_tokens, seq_len)
    if query_tokens == 0:
        return DenseReason.SHORT_CONTEXT
    if query_tokens < method.min_query_tokens:
        return DenseReason.SHORT_PROMPT_CHUNK
    if not has_sparse_layers:
        return DenseReason.LOW_RECALL
    if costs is None:
        return None
    cost = costs.chunk_cost(method, query_tokens, seq_len)
    if most_cost is None:
        return None if cost < 1 else DenseReason.UNPROFITABLE
    return None if cost <= most_cost else DenseReason.TOO_EXPENSIVE


def longest_dense_seq_len(method: DecodeMethod, min_tokens: int) -> int:
    """The longest context, in tokens with this step's, with which a decode row still runs dense.

    Args:
        method: of the request's decoding.
        min_tokens: the request's ``sparse_min_tokens``.
    """
    return max(min_tokens - 1, method.budget_tokens)


def why_decode_is_dense(
    method: DecodeMethod,
    min_tokens: int,
    seq_len: int,
    speculative: bool = False,
    room: ScoringRoom | None = None,
    has_sparse_layers: bool = True,
    pays: bool = True,
    soft_cap: bool = False,
) -> DenseReason | None:
    """Why a decode row runs dense; None if it is sparse.

    Args:
        method: of the request's decoding.
        min_tokens: the request's ``sparse_min_tokens``.
        seq_len: tokens in the request's cache, the newest included.
        speculative: the row verifies drafted tokens.
        room: of rows that are served at once, asked in their order; None for a row that is served alone.
        has_sparse_layers: the guard has not sent all layers dense that read lists.
        pays: the row by itself is not slower than dense.
        soft_cap: the model caps its attention logits.
    """
    if speculative:
        return DenseReason.SPECULATIVE
    if soft_cap and method.weighs_masses:
        return DenseReason.SOFT_CAP
    if seq_len <= longest_dense_seq_len(method, min_tokens):
        return DenseReason.SHORT_CONTEXT
    if not has_sparse_layers:
        return DenseReason.LOW_RECALL
    if not pays:
        return DenseReason.UNPROFITABLE
    # Rows that are served at once have methods of this kind.
    if room is not None and not room.take(seq_len if cast("BatchDecodeMethod", method).scores_tokens else 0):
        return DenseReason.NO_ROOM
    return None
