"""The best tokens of pages that a first stage has kept, in PyTorch: the specification, without waiting for a device."""

from __future__ import annotations

import torch

from vllm_sparse.kernels.top_tokens import TokenBudget, top_pages
from vllm_sparse.keys import PagedKeys
from vllm_sparse.pages import PageList

# What a row's coverage counts in, where it is an integer.
COVERAGE_UNITS = 1_000_000


def best_candidates(
    query: torch.Tensor,
    keys: PagedKeys,
    scale: float,
    candidates: PageList,
    page_size_tokens: int,
    budget: TokenBudget,
    coverage: float,
) -> PageList:
    """Choose among the tokens of each KV head's candidate pages by the attention that they have among themselves.

    Each query head gives the candidates probabilities, by a softmax over them alone; the heads of a group are merged by
    the sum, because logit ranges differ between heads. Scores are logarithms, because the small probabilities of a
    sharp head would all become 0 and lose their order. Where the executor's pages are coarser than a token, one is
    worth the sum over the candidates in it. No paper's: Quest (arXiv 2406.10774) reads the pages that this begins with.

    Args:
        query: ``[query_heads, head_size]`` of the newest token.
        keys: the request's keys, the newest token's included.
        scale: softmax scale of the model.
        candidates: a list for each KV head, all of one length, with the pages of sink and recent tokens.
        page_size_tokens: page size of the executor.
        budget: tokens to keep.
        coverage: share of the candidates' probability at which a list ends, above 0; 1 keeps the whole budget.

    Returns:
        A list for each KV head.
    """
    context, page = keys.seq_len, page_size_tokens
    offset = torch.arange(candidates.page_size_tokens, device=query.device)
    positions = (candidates.pages.long().unsqueeze(2) * candidates.page_size_tokens + offset).flatten(1)
    # Only the last page may be short, and it is in every list.
    positions = positions[:, : positions.shape[1] - (-context % candidates.page_size_tokens)]
    grouped = query.float().reshape(keys.num_kv_heads, -1, query.shape[1])
    logits = torch.bmm(grouped, keys.gather(positions).float().transpose(1, 2)).mul_(scale)
    scores = logits.new_full((keys.num_kv_heads, -(-context // page) * page), float("-inf"))
    scores.scatter_(1, positions, logits.log_softmax(dim=2).logsumexp(dim=1))
    scores = scores.view(keys.num_kv_heads, -1, page).logsumexp(dim=2)
    return top_pages(scores, context, page, page, budget, coverage)
