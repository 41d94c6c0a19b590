"""Scores of a request's pages, in PyTorch: the specification, on any device."""

from __future__ import annotations

import torch


def page_scores(query: torch.Tensor, summaries: torch.Tensor, scale: float) -> torch.Tensor:
    """Logarithm of the largest softmax probability over the pages that a query head of the group gives each page.

    A page's logit is the product of the query and its mean key (Kinetics, arXiv 2506.05333), or where bounds are kept
    the sum over the dimensions of the larger of the query's products with the two (Quest, arXiv 2406.10774), which no
    key of the page exceeds. Heads are merged by probability: logit ranges differ between heads, so raw logits must not
    be compared. Logarithms, because a sharp head's small probabilities would all become 0 and lose their order.

    Args:
        query: ``[query_heads, head_size]`` of the newest token.
        summaries: ``[kv_heads, pages, width]``, of bounds if the width is twice the head size.
        scale: softmax scale of the model.

    Returns:
        float32 ``[kv_heads, pages]``.
    """
    head_size = query.shape[1]
    grouped = query.float().reshape(summaries.shape[0], -1, head_size)
    if summaries.shape[2] == 2 * head_size:
        # A negative number has its largest product with the least one.
        grouped = torch.cat((grouped.clamp(max=0), grouped.clamp(min=0)), dim=2)
    logits = torch.bmm(grouped, summaries.float().transpose(1, 2)).mul_(scale)
    return logits.log_softmax(dim=2).amax(dim=1)
