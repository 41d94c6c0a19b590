"""The best pages of a context under a budget, in PyTorch: the specification, without a device-to-host sync."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_sparse.kernels.page_list import compact_pages
from vllm_sparse.pages import PageList
from vllm_sparse.step.rows import DecodeRows, RowScores, TokenLists


@dataclass(frozen=True)
class TokenBudget:
    """How many tokens a list keeps, and which always.

    Attributes:
        budget_tokens: tokens to keep, the forced ones included; rounded up to units. Forced units are kept even beyond
            it.
        sink_tokens: first tokens of the context, forced.
        recent_tokens: last tokens of the context, forced; the newest token always is.
    """

    budget_tokens: int
    sink_tokens: int
    recent_tokens: int


def best_of_pages(scores: torch.Tensor, page_size_tokens: int) -> torch.Tensor:
    """What pages are worth by their best token.

    Args:
        scores: ``[lists, tokens]``.
        page_size_tokens: the last page may be short.

    Returns:
        ``[lists, ceil(tokens / page_size_tokens)]``.
    """
    padded = torch.nn.functional.pad(scores, (0, -scores.shape[1] % page_size_tokens), value=float("-inf"))
    return padded.view(scores.shape[0], -1, page_size_tokens).amax(2)


def top_pages(
    scores: torch.Tensor,
    seq_len: int,
    unit_tokens: int,
    page_size_tokens: int,
    budget: TokenBudget,
    coverage: float = 1.0,
) -> PageList:
    """Keep the units that hold the first and the last tokens, then those of the highest scores while the budget lasts.

    Of equal scores the lower unit wins. With a `coverage` below 1, the scores being logarithms of masses, no more units
    are kept than it takes until their mass, the forced ones' included, reaches that share of the row's.

    Args:
        scores: float32 ``[rows, ceil(context / unit_tokens)]``, neither NaN nor plus infinity.
        seq_len: tokens in the request's cache.
        unit_tokens: adjacent tokens that share one score.
        page_size_tokens: page size of the executor; divides `unit_tokens`.
        budget: tokens to keep.
        coverage: share of a row's mass, above 0; 1 keeps the whole budget.

    Returns:
        A list for each row. With a `coverage` of 1 all lists have one length, which is the width.
    """
    rows, units = scores.shape
    sink_units = min(-(-budget.sink_tokens // unit_tokens), units)
    first_recent_unit = max(max(seq_len - max(budget.recent_tokens, 1), 0) // unit_tokens, sink_units)
    logarithms, scores = scores, scores.clone()
    scores[:, :sink_units] = float("inf")
    scores[:, first_recent_unit:] = float("inf")
    forced_units = sink_units + units - first_recent_unit
    count = min(max(-(-budget.budget_tokens // unit_tokens), forced_units), units)
    # `topk` does not define which of equal scores it takes, so only its threshold is used.
    threshold = scores.topk(count, dim=1, sorted=True).values[:, -1:]
    above, equal = scores > threshold, scores == threshold
    kept = above | (equal & (equal.cumsum(1) <= count - above.sum(1, keepdim=True)))
    if coverage < 1:
        kept &= (scores == float("inf")) | _covering(scores, logarithms.exp(), coverage)
    pages_per_unit = unit_tokens // page_size_tokens
    if pages_per_unit > 1:
        kept = kept.repeat_interleave(pages_per_unit, dim=1)[:, : -(-seq_len // page_size_tokens)]
    last_position = torch.full((rows,), seq_len - 1, device=scores.device)
    lists = compact_pages(kept, last_position, page_size_tokens)
    return PageList(lists.pages[:, : count * pages_per_unit].contiguous(), lists.kept_tokens, page_size_tokens)


def _covering(scores: torch.Tensor, masses: torch.Tensor, coverage: float) -> torch.Tensor:
    """The fewest units, in falling order of scores, that hold a share of their row's mass: bool, the scores' shape."""
    order = scores.argsort(dim=1, descending=True, stable=True)
    ordered = masses.double().gather(1, order)
    before = ordered.cumsum(1) - ordered
    return torch.zeros_like(order, dtype=torch.bool).scatter_(
        1, order, before < coverage * ordered.sum(1, keepdim=True)
    )


def top_tokens(scores: RowScores, rows: DecodeRows, knobs: torch.Tensor, lists: TokenLists) -> None:
    """Select each row's best units and write the slots of their tokens.

    Args:
        scores: scores of the rows' units.
        rows: the rows. Those with a context of 0 keep their lists.
        knobs: int32 ``[rows, 3]`` the fields of each row's `TokenBudget`.
        lists: written; at least as wide as the largest budget and two units.
    """
    _, kv_heads, block_size, _ = rows.kv_cache.shape
    unit = scores.unit_tokens
    values = scores.values.flatten()
    for row, context in enumerate(rows.seq_lens.tolist()):
        if context == 0:
            continue
        start, units = int(scores.starts[row]), -(-context // unit)
        firsts = [start + head * scores.head_stride for head in range(kv_heads)]
        heads = torch.stack([values[first : first + units] for first in firsts])
        chosen = top_pages(heads, context, unit, unit, TokenBudget(*knobs[row].tolist()))
        kept = int(chosen.kept_tokens[0])
        positions = (chosen.pages.unsqueeze(2) * unit + torch.arange(unit, device=heads.device)).flatten(1)[:, :kept]
        head = torch.arange(kv_heads, device=heads.device).unsqueeze(1)
        slots = (rows.block_table[row, positions // block_size] * kv_heads + head) * block_size
        lists.slots[row * kv_heads : (row + 1) * kv_heads, :kept] = slots + positions % block_size
        lists.kept_tokens[row * kv_heads : (row + 1) * kv_heads] = kept
