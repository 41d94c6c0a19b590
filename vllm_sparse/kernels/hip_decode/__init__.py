"""HiP's selection for decode steps, with the results of stages kept from step to step."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vllm_sparse.kernels.hierarchical_descent import Stage
from vllm_sparse.kernels.hip_decode import reference
from vllm_sparse.keys import PagedKeys

__all__ = ["decode_leaves"]


def decode_leaves(
    query: torch.Tensor,
    keys: PagedKeys,
    stages: Sequence[Stage],
    kept: Sequence[torch.Tensor],
    sink_tokens: int,
    window_tokens: int,
    first_refresh: int,
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Leaves that one request's newest token reads, by the search of `hierarchical_descent` (InfiniteHiP, section 3).

    The first stages may be skipped: what they kept at an earlier step is given. Therefore all steps between two
    multiples of `first_refresh` have one search range, that of the first of them: it ends `window_tokens` before the
    newest token of that step, and the window starts there and grows until the next multiple. So no token is ever in
    neither, and none in both.

    Args:
        query: ``[query_heads, head_size]`` of the newest token.
        keys: the request's keys, the newest token's included.
        stages: as for `hierarchical_descent`, of query stride 1.
        kept: results of the first stages, from a step since the last multiple of `first_refresh`; those of the others
            are searched for.
        sink_tokens: first tokens, always kept, rounded up to a leaf.
        window_tokens: tokens before the newest, always kept.
        first_refresh: steps between two searches of the first stage.

    Returns:
        For each stage int64 ``[kv_heads, n]``, first tokens of the chunks that it keeps, in ascending order; and bool
        ``[kv_heads, ceil(context / LEAF_TOKENS)]``, the leaves.
    """
    return reference.decode_leaves(query, keys, stages, kept, sink_tokens, window_tokens, first_refresh)
