"""Scores of all cached tokens for one decode query by their keys' codes, in PyTorch: the specification."""

from __future__ import annotations

import torch

from vllm_sparse.kernels.page_summaries import coded_keys


def code_scores(query: torch.Tensor, summaries: torch.Tensor, seq_len: int, scale: float) -> torch.Tensor:
    """Logarithm of each token's attention probability if keys were what their codes say.

    As `kernels.token_scores` with merged heads: by the largest probability that a query head of the KV head gives.

    Args:
        query: ``[query_heads, head_size]`` of the newest token.
        summaries: uint8 ``[kv_heads, pages, width]`` codes of the pages, as `SummaryKind.codes` lays them out.
        seq_len: tokens in the cache; the last page may be short.
        scale: softmax scale of the model.

    Returns:
        float32 ``[kv_heads, seq_len]``.
    """
    keys = coded_keys(summaries, query.shape[1])[:, :seq_len]
    grouped = query.float().reshape(keys.shape[0], -1, query.shape[1])
    return torch.bmm(grouped, keys.transpose(1, 2)).mul_(scale).log_softmax(dim=2).amax(dim=1)
