"""Lists as `tokentopk` chooses them, while a model decodes told tokens in this process."""

from __future__ import annotations

import torch

from vllm_sparse.kernels.page_summaries import coded_keys, page_summaries
from vllm_sparse.keys import plain_keys
from vllm_sparse.methods.token_topk import TokenTopk


def coded_lists(
    method: TokenTopk, query: torch.Tensor, key: torch.Tensor, scores: torch.Tensor, scale: float
) -> torch.Tensor:
    """The lists that the method chooses for steps which follow one another, as `TokenTopk.select` does for each.

    Args:
        method: whose knobs count.
        query: ``[kv_heads, group, steps, head_size]``.
        key: ``[kv_heads, tokens, head_size]``; the last `steps` tokens are the queries' own.
        scores: float32 ``[kv_heads, group, steps, tokens]``, scaled, minus infinity beyond a step's own token.
        scale: softmax scale.

    Returns:
        bool ``[kv_heads, 1, steps, tokens]``, tokens of each list.
    """
    steps, tokens = scores.shape[2:]
    positions = torch.arange(tokens, device=scores.device)
    newest = positions[-steps:].unsqueeze(1)
    # A page is coded from the step on whose token fills it; until then its tokens count by their keys, and are forced.
    coded = (newest + 1) // method.page_tokens * method.page_tokens
    whole = tokens // method.page_tokens * method.page_tokens
    numbers = coded_keys(page_summaries(plain_keys(key[:, :whole]), method.summaries), key.shape[2])
    by_codes = query.float() @ numbers.transpose(1, 2).unsqueeze(1) * scale
    approximate = scores.clone()
    approximate[..., :whole] = torch.where(positions[:whole] < coded, by_codes, scores[..., :whole])
    ranking = approximate.log_softmax(3).amax(1, keepdim=True)
    recent = positions > newest - max(method.recent_tokens, 1)
    ranking = ranking.masked_fill((positions < method.sink_tokens) | recent | (positions >= coded), torch.inf)
    # Beyond a step's own token stand the tokens of later steps, which fill no place of the list.
    ranking = ranking.masked_fill(positions > newest, -torch.inf)
    best = ranking.topk(min(method.budget_tokens, tokens), 3).indices
    return torch.zeros_like(ranking, dtype=torch.bool).scatter_(3, best, True) & (positions <= newest)
