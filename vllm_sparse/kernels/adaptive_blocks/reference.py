"""DHSA's adaptive key blocks in PyTorch: the specification, on any device."""

from __future__ import annotations

import torch

from vllm_sparse.keys import PagedKeys

# Number of keys on each side of a position that are compared, and of positions on each side that a boundary must
# exceed.
WINDOW_TOKENS, SUPPRESSION_TOKENS = 4, 8
SHORTEST_TOKENS, LONGEST_TOKENS = 8, 64
# A split is dropped if a boundary follows it within fewer tokens than the shortest key block has. The key block before
# that boundary is then as long as the two pieces together, hence the shorter distance of splits.
SPLIT_TOKENS = LONGEST_TOKENS - SHORTEST_TOKENS + 1
# A split depends on boundaries up to SHORTEST_TOKENS - 1 later, a boundary on scores up to SUPPRESSION_TOKENS later,
# and a score at position p on keys up to p + WINDOW_TOKENS - 1.
LOOK_AHEAD_TOKENS = SHORTEST_TOKENS - 1 + SUPPRESSION_TOKENS + WINDOW_TOKENS
# Keys are read in tiles, so that memory never holds a copy of a whole long cache.
TILE_TOKENS = 4096


def boundary_scores(keys: PagedKeys) -> torch.Tensor:
    """How much keys change at each position: float32 ``[context]``.

    At position ``p``: ``1 - cosine`` between the sum of keys ``p - 4`` to ``p - 1`` and the sum of keys ``p`` to
    ``p + 3``, all KV heads concatenated. Minus infinity where no key block can start: at the first 8 positions and the
    last 3.
    """
    context, window = keys.seq_len, WINDOW_TOKENS
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


def block_starts(scores: torch.Tensor, threshold: float) -> torch.Tensor:
    """First positions of the key blocks and the end of the last: int64 ``[context // 8 + 2]``, padded with the context.

    Works on all positions at once, without a device-to-host sync.

    Args:
        scores: float32 ``[context]`` of `boundary_scores`.
        threshold: least score of a boundary.
    """
    context = scores.shape[0]
    # The largest possible number of key blocks: all but the last have at least the shortest length.
    key_blocks = context // SHORTEST_TOKENS + 1
    position = torch.arange(context, device=scores.device)

    def positions(flags: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
        """Positions of the flags, ascending; `count` is the number of flags up to and with each position."""
        slot = torch.where(flags, count - 1, key_blocks + 1)
        return torch.full((key_blocks + 2,), context, device=scores.device).scatter_(0, slot, position)[:-1]

    reach = SUPPRESSION_TOKENS
    padded = torch.nn.functional.pad(scores, (reach, reach), value=float("-inf"))
    highest = torch.nn.functional.max_pool1d(padded.unsqueeze(0), reach, 1).squeeze(0)
    boundary = (scores > highest[:context]) & (scores > highest[reach + 1 :]) & (scores > threshold)
    # Writing True to an element would wait for the device.
    boundary[:1].fill_(True)

    count = boundary.cumsum(0)
    past_boundary = position - positions(boundary, count)[count - 1]
    ahead = SHORTEST_TOKENS - 1
    boundary_follows = torch.nn.functional.pad(count[ahead:], (0, min(ahead, context))) > count
    boundary |= (past_boundary % SPLIT_TOKENS == 0) & ~boundary_follows
    # There is no boundary where keys that decide it do not exist yet.
    boundary &= position <= context - LOOK_AHEAD_TOKENS
    boundary[:1].fill_(True)
    return positions(boundary, boundary.cumsum(0))


def representations(keys: PagedKeys, start: torch.Tensor) -> torch.Tensor:
    """``sqrt(length) * mean`` of each key block: float32 ``[kv_heads, key_blocks, head_size]``; 0 for empty ones.

    Args:
        keys: the request's keys.
        start: int64 ``[key_blocks + 1]`` as `block_starts` returns it.
    """
    context = keys.seq_len
    key_blocks = start.shape[0] - 1
    device = start.device
    key_block = torch.searchsorted(start, torch.arange(context, device=device), right=True) - 1
    sums = torch.zeros(keys.num_kv_heads, key_blocks, keys.head_size, device=device)
    for begin in range(0, context, TILE_TOKENS):
        tile = keys.read(begin, min(begin + TILE_TOKENS, context)).float()
        sums.index_add_(1, key_block[begin : begin + TILE_TOKENS], tile)
    length = start[1:] - start[:-1]
    return sums / length.clamp(min=1).sqrt().unsqueeze(1)
