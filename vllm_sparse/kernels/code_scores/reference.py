"""Scores of all cached tokens for one decode query by their keys' codes, in PyTorch: the specification."""

from __future__ import annotations

import torch

from vllm_sparse.kernels.page_summaries import SummaryKind, coded_keys, read_summaries
from vllm_sparse.keys import PagedKeys


def code_scores(query: torch.Tensor, keys: PagedKeys, kind: SummaryKind, scale: float) -> torch.Tensor:
    """Logarithm of each token's attention probability if the keys of full pages were what their codes say.

    As `kernels.token_scores` with merged heads: by the largest probability that a query head of the KV head gives. The
    tokens of the last page, while it is not full, count by their keys themselves.

    Args:
        query: ``[query_heads, head_size]`` of the newest token.
        keys: of the request.
        kind: with codes.
        scale: softmax scale of the model.

    Returns:
        float32 ``[kv_heads, seq_len]``.
    """
    coded = keys.seq_len // kind.page_tokens * kind.page_tokens
    summaries = read_summaries(keys, kind)[:, : coded // kind.page_tokens]
    numbers = coded_keys(summaries, keys.head_size)
    if coded < keys.seq_len:
        numbers = torch.cat((numbers, keys.read(coded, keys.seq_len).float()), dim=1)
    grouped = query.float().reshape(keys.num_kv_heads, -1, keys.head_size)
    return torch.bmm(grouped, numbers.transpose(1, 2)).mul_(scale).log_softmax(dim=2).amax(dim=1)
