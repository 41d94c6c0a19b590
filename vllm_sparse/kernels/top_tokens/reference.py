"""The best pages of a context under a budget, in PyTorch: the specification, without a device-to-host sync."""

from __future__ import annotations

import torch

from vllm_sparse.kernels.page_list import compact_pages
from vllm_sparse.pages import PageList
from vllm_sparse.step.rows import DecodeRows, RowScores, TokenLists


def top_pages(
    scores: torch.Tensor,
    context_tokens: int,
    unit_tokens: int,
    page_size_tokens: int,
    budget_tokens: int,
    sink_tokens: int,
    recent_tokens: int,
) -> PageList:
    """Keep the units that hold the first and the last tokens, then those of the highest scores while the budget lasts.

    Equal scores: the lower unit wins.

    Args:
        scores: float32 ``[rows, ceil(context / unit)]``, neither NaN nor plus infinity.
        context_tokens: tokens in the request's cache.
        unit_tokens: tokens that have a score together.
        page_size_tokens: page size of the executor; divides a unit.
        budget_tokens: tokens to keep, the forced ones included; rounded up to units. Forced units stay even beyond it.
        sink_tokens: first tokens, forced.
        recent_tokens: last tokens, forced; the newest one always is.

    Returns:
        A list for each row, all of one length and no wider than that.
    """
    rows, units = scores.shape
    sink_units = min(-(-sink_tokens // unit_tokens), units)
    first_recent_unit = max(max(context_tokens - max(recent_tokens, 1), 0) // unit_tokens, sink_units)
    scores = scores.clone()
    scores[:, :sink_units] = float("inf")
    scores[:, first_recent_unit:] = float("inf")
    forced_units = sink_units + units - first_recent_unit
    count = min(max(-(-budget_tokens // unit_tokens), forced_units), units)
    # A top-k alone does not promise which of equal scores it takes.
    threshold = scores.topk(count, dim=1, sorted=True).values[:, -1:]
    above, equal = scores > threshold, scores == threshold
    kept = above | (equal & (equal.cumsum(1) <= count - above.sum(1, keepdim=True)))
    pages_per_unit = unit_tokens // page_size_tokens
    if pages_per_unit > 1:
        kept = kept.repeat_interleave(pages_per_unit, dim=1)[:, : -(-context_tokens // page_size_tokens)]
    last_position = torch.full((rows,), context_tokens - 1, device=scores.device)
    lists = compact_pages(kept, last_position, page_size_tokens)
    return PageList(lists.pages[:, : count * pages_per_unit].contiguous(), lists.kept_tokens, page_size_tokens)


def top_tokens(scores: RowScores, rows: DecodeRows, knobs: torch.Tensor, lists: TokenLists) -> None:
    """Choose each row's best units and write their tokens' places.

    Args:
        scores: of the rows' units.
        rows: the rows; lists of those with context 0 stay as they are.
        knobs: int32 ``[rows, 3]`` budget, sink and recent tokens, as in `top_pages`.
        lists: as wide as the largest budget and two units.
    """
    _, kv_heads, block_size, _ = rows.kv_cache.shape
    unit = scores.unit_tokens
    values = scores.values.flatten()
    for row, context in enumerate(rows.context_tokens.tolist()):
        if context == 0:
            continue
        start, units = int(scores.starts[row]), -(-context // unit)
        firsts = [start + head * scores.head_stride for head in range(kv_heads)]
        heads = torch.stack([values[first : first + units] for first in firsts])
        chosen = top_pages(heads, context, unit, unit, *knobs[row].tolist())
        kept = int(chosen.kept_tokens[0])
        positions = (chosen.pages.unsqueeze(2) * unit + torch.arange(unit, device=heads.device)).flatten(1)[:, :kept]
        head = torch.arange(kv_heads, device=heads.device).unsqueeze(1)
        slots = (rows.block_table[row, positions // block_size] * kv_heads + head) * block_size
        lists.slots[row * kv_heads : (row + 1) * kv_heads, :kept] = slots + positions % block_size
        lists.kept_tokens[row * kv_heads : (row + 1) * kv_heads] = kept
