"""Exact attention of query blocks to pages in PyTorch: the specification, on any device."""

from __future__ import annotations

import torch

from vllm_sparse.keys import PagedKeys


def block_mass(
    query: torch.Tensor, keys: PagedKeys, scale: float, query_block_tokens: int, page_tokens: int
) -> torch.Tensor:
    """Attention mass of each page; arguments as in the public function.

    Computes in float64 if the queries are float64, else in float32. Holds the products of one query block and of one
    KV head's query heads at a time.
    """
    query_tokens, heads, head_size = query.shape
    kv_heads, context = keys.num_kv_heads, keys.seq_len
    dtype = torch.promote_types(query.dtype, torch.float32)
    transposed = keys.read(0, context).to(dtype).transpose(1, 2)
    position = torch.arange(context, device=query.device)
    blocks, pages = -(-query_tokens // query_block_tokens), -(-context // page_tokens)
    mass = torch.zeros(heads, blocks, pages, dtype=dtype, device=query.device)
    for i_block, block in enumerate(torch.split(query, query_block_tokens)):
        rows = block.shape[0]
        first = context - query_tokens + i_block * query_block_tokens
        stop = first + rows
        future = position[:stop] > position[first:stop].unsqueeze(1)
        grouped = block.to(dtype).transpose(0, 1).reshape(kv_heads, -1, head_size)
        for i_head, (queries, head_keys) in enumerate(zip(grouped, transposed, strict=True)):
            scores = (queries @ head_keys[:, :stop]).mul_(scale).view(-1, rows, stop)
            weight = scores.masked_fill_(future, float("-inf")).softmax(2).sum(1)
            padded = torch.nn.functional.pad(weight, (0, pages * page_tokens - stop))
            group = padded.shape[0]
            mass[i_head * group : (i_head + 1) * group, i_block] = padded.view(group, pages, page_tokens).sum(2)
    return mass
