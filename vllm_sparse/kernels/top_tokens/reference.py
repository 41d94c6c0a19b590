"""The best pages of a context under a budget, in PyTorch: the specification, without a device-to-host sync."""

from __future__ import annotations

import torch

from vllm_sparse.kernels.page_list import compact_pages
from vllm_sparse.pages import PageList
from vllm_sparse.rows import DecodeRows, RowScores, TokenLists


def top_pages(
    scores: torch.Tensor,
    context_tokens: int,
    page_size_tokens: int,
    budget_tokens: int,
    sink_tokens: int,
    recent_tokens: int,
) -> PageList:
    """Choose the pages with the largest scores; the first and the last ones are kept whatever their scores.

    Args:
        scores: float32 ``[heads, ceil(context / page)]``, neither NaN nor plus infinity.
        context_tokens: tokens in the cache.
        page_size_tokens: tokens of a page.
        budget_tokens: rounded up to pages; forced pages count, and stay where they are more.
        sink_tokens: first tokens, always kept.
        recent_tokens: last tokens, always kept; at least the newest is.

    Returns:
        One list per head, all of one length and no wider than that. Of equal scores at the cut the lower page stays.
    """
    heads, pages = scores.shape
    sink_pages = min(-(-sink_tokens // page_size_tokens), pages)
    first_recent = max(max(context_tokens - max(recent_tokens, 1), 0) // page_size_tokens, sink_pages)
    forced_pages = sink_pages + pages - first_recent
    count = min(max(-(-budget_tokens // page_size_tokens), forced_pages), pages)
    scores = scores.clone()
    scores[:, :sink_pages] = float("inf")
    scores[:, first_recent:] = float("inf")
    # A top-k alone does not promise the lower of equals.
    threshold = scores.topk(count, dim=1, sorted=True).values[:, -1:]
    above, equal = scores > threshold, scores == threshold
    kept = above | (equal & (equal.cumsum(1) <= count - above.sum(1, keepdim=True)))
    last_position = torch.full((heads,), context_tokens - 1, device=scores.device)
    lists = compact_pages(kept, last_position, page_size_tokens)
    return PageList(lists.pages[:, :count].contiguous(), lists.kept_tokens, page_size_tokens)


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
        chosen = top_pages(heads, context, unit, *knobs[row].tolist())
        kept = int(chosen.kept_tokens[0])
        positions = (chosen.pages.unsqueeze(2) * unit + torch.arange(unit, device=heads.device)).flatten(1)[:, :kept]
        head = torch.arange(kv_heads, device=heads.device).unsqueeze(1)
        slots = (rows.block_table[row, positions // block_size] * kv_heads + head) * block_size
        lists.slots[row * kv_heads : (row + 1) * kv_heads, :kept] = slots + positions % block_size
        lists.kept_tokens[row * kv_heads : (row + 1) * kv_heads] = kept
