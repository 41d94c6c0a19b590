"""DHSA's adaptive chunks in PyTorch: the specification, on any device."""

from __future__ import annotations

import torch

from vllm_sparse.keys import PagedKeys

# Keys on each side of a position that are compared, and positions on each side that a boundary must exceed.
WINDOW_TOKENS, SUPPRESSION_TOKENS = 4, 8
SHORTEST_TOKENS, LONGEST_TOKENS = 8, 64
# A split that a boundary follows within fewer than the shortest chunk's tokens is dropped, so the piece before that
# boundary is as long as the two together.
SPLIT_TOKENS = LONGEST_TOKENS - SHORTEST_TOKENS + 1
# A split depends on boundaries up to SHORTEST_TOKENS - 1 later, these on scores up to SUPPRESSION_TOKENS later, and
# a score at position p on keys up to p + WINDOW_TOKENS - 1.
LOOK_AHEAD_TOKENS = SHORTEST_TOKENS - 1 + SUPPRESSION_TOKENS + WINDOW_TOKENS
# Keys are read in tiles, so that a copy of a long cache is never held as a whole.
TILE_TOKENS = 4096


def boundary_scores(keys: PagedKeys) -> torch.Tensor:
    """How much keys change at each position: float32 ``[context]``.

    At ``p``: ``1 - cosine`` of the sums of keys ``p - 4`` to ``p - 1`` and ``p`` to ``p + 3``, all KV heads side by
    side. Minus infinity where a chunk cannot start: at the first 8 positions and the last 3.
    """
    context, window = keys.context_tokens, WINDOW_TOKENS
    scores = torch.full((context,), float("-inf"), device=keys.kv_cache.device)
    for begin in range(SHORTEST_TOKENS, context - window + 1, TILE_TOKENS):
        end = min(begin + TILE_TOKENS, context - window + 1)
        tile = keys.read(begin - window, end + window - 1).float()
        pair = tile[:, :-1] + tile[:, 1:]
        sums = pair[:, :-2] + pair[:, 2:]
        product = (sums[:, :-window] * sums[:, window:]).sum(2).sum(0)
        norm = sums.square().sum(2).sum(0).sqrt()
        tiny = torch.finfo(torch.float32).tiny
        scores[begin:end] = 1 - product / (norm[:-window] * norm[window:]).clamp(min=tiny)
    return scores


def chunk_starts(scores: torch.Tensor, threshold: float) -> torch.Tensor:
    """First positions of the chunks and the end of the last: int64 ``[context // 8 + 2]``, padded with the context.

    Parallel over positions and without a device-to-host sync.

    Args:
        scores: float32 ``[context]`` of `boundary_scores`.
        threshold: least score of a boundary.
    """
    context = scores.shape[0]
    # As many chunks as there can be: all but the last have at least the shortest length.
    chunks = context // SHORTEST_TOKENS + 1
    position = torch.arange(context, device=scores.device)

    def positions(flags: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
        """Positions of the flags in order, given how many there are up to each position."""
        slot = torch.where(flags, count - 1, chunks + 1)
        return torch.full((chunks + 2,), context, device=scores.device).scatter_(0, slot, position)[:-1]

    reach = SUPPRESSION_TOKENS
    padded = torch.nn.functional.pad(scores, (reach, reach), value=float("-inf"))
    highest = torch.nn.functional.max_pool1d(padded.unsqueeze(0), reach, 1).squeeze(0)
    boundary = (scores > highest[:context]) & (scores > highest[reach + 1 :]) & (scores > threshold)
    boundary[0] = True

    count = boundary.cumsum(0)
    past_boundary = position - positions(boundary, count)[count - 1]
    ahead = SHORTEST_TOKENS - 1
    boundary_follows = torch.nn.functional.pad(count[ahead:], (0, min(ahead, context))) > count
    boundary |= (past_boundary % SPLIT_TOKENS == 0) & ~boundary_follows
    # Where keys are missing that decide, there is no boundary yet.
    boundary &= position <= context - LOOK_AHEAD_TOKENS
    boundary[0] = True
    return positions(boundary, boundary.cumsum(0))


def representations(keys: PagedKeys, start: torch.Tensor) -> torch.Tensor:
    """``sqrt(length) * mean`` of each chunk: float32 ``[kv_heads, chunks, head_size]``, 0 for chunks of no tokens.

    Args:
        keys: the request's keys.
        start: int64 ``[chunks + 1]`` as of `chunk_starts`.
    """
    context = keys.context_tokens
    chunks = start.shape[0] - 1
    device = start.device
    chunk = torch.searchsorted(start, torch.arange(context, device=device), right=True) - 1
    sums = torch.zeros(keys.num_kv_heads, chunks, keys.head_size, device=device)
    for begin in range(0, context, TILE_TOKENS):
        tile = keys.read(begin, min(begin + TILE_TOKENS, context)).float()
        sums.index_add_(1, chunk[begin : begin + TILE_TOKENS], tile)
    length = start[1:] - start[:-1]
    return sums / length.clamp(min=1).sqrt().unsqueeze(1)
