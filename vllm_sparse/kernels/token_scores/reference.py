"""Scores of all cached tokens for one decode query, in PyTorch: the specification, on any device."""

from __future__ import annotations

import torch

from vllm_sparse.keys import PagedKeys

# Keys are read in tiles of this many tokens, so that memory never holds a copy of a whole long cache.
TILE_TOKENS = 65536


def token_scores(query: torch.Tensor, keys: PagedKeys, scale: float, merge_heads: bool) -> torch.Tensor:
    """Logarithm of each cached token's attention probability, per KV head or per query head.

    The query heads of a KV head are merged by the maximum of their *probabilities*, because logit ranges differ between
    heads (TidalDecode, arXiv 2410.05076, has one list per query head; the merge is this project's). Scores are
    logarithms, because the small probabilities of a sharp head would all become 0 and lose their order.

    Args:
        query: ``[query_heads, head_size]`` of the newest token.
        keys: the request's keys, the newest token's included.
        scale: softmax scale of the model.
        merge_heads: whether to merge the query heads of each KV head.

    Returns:
        float32 ``[kv_heads, context]`` if merged, else ``[query_heads, context]``.
    """
    num_kv_heads = keys.num_kv_heads
    grouped = query.reshape(num_kv_heads, -1, query.shape[-1])
    tiles = []
    for start in range(0, keys.seq_len, TILE_TOKENS):
        tile = keys.read(start, min(start + TILE_TOKENS, keys.seq_len))
        if query.is_cuda:
            tiles.append(torch.bmm(grouped, tile.transpose(1, 2), out_dtype=torch.float32))
        else:
            tiles.append(torch.bmm(grouped.float(), tile.float().transpose(1, 2)))
    logarithms = torch.cat(tiles, dim=2).mul_(scale).log_softmax(dim=2)
    return logarithms.amax(dim=1) if merge_heads else logarithms.flatten(0, 1)
