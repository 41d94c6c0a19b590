"""Scores of a request's pages, in PyTorch: the specification, on any device."""

from __future__ import annotations

import torch


def page_scores(query: torch.Tensor, summaries: torch.Tensor, scale: float) -> torch.Tensor:
    """Logarithm of the largest probability that a query head of each KV head gives each page, by a softmax over pages.

    A page's logit is the product of the query and the page's mean key (Kinetics, arXiv 2506.05333). Where bounds are
    kept it is the sum over channels of the larger of the query's products with the two bounds, which no key of the page
    exceeds (Quest, arXiv 2406.10774). Heads are merged by probability, because logit ranges differ between heads.
    Scores are logarithms, because the small probabilities of a sharp head would all become 0 and lose their order.

    Args:
        query: ``[query_heads, head_size]`` of the newest token.
        summaries: ``[kv_heads, pages, width]``: bounds if the width is twice the head size, else means.
        scale: softmax scale of the model.

    Returns:
        float32 ``[kv_heads, pages]``.
    """
    head_size = query.shape[1]
    grouped = query.float().reshape(summaries.shape[0], -1, head_size)
    if summaries.shape[2] == 2 * head_size:
        # A negative number of the query has its largest product with the lower bound.
        grouped = torch.cat((grouped.clamp(max=0), grouped.clamp(min=0)), dim=2)
    logits = torch.bmm(grouped, summaries.float().transpose(1, 2)).mul_(scale)
    return logits.log_softmax(dim=2).amax(dim=1)
