"""HiP's selection for decode steps, which keeps the results of its stages from step to step."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vllm_sparse.kernels.hip_decode import reference
from vllm_sparse.kernels.hip_decode.memory import (
    ROW_KNOBS,
    STAGE_KNOBS,
    HipMemory,
    RowMemory,
    StageMemory,
    StageScratch,
)
from vllm_sparse.kernels.hip_decode.reference import DecodeSearch
from vllm_sparse.keys import PagedKeys
from vllm_sparse.step.rows import DecodeRows, TokenLists

__all__ = [
    "ROW_KNOBS",
    "STAGE_KNOBS",
    "DecodeSearch",
    "HipMemory",
    "RowMemory",
    "StageMemory",
    "StageScratch",
    "decode_leaves",
    "token_lists",
]


def decode_leaves(
    query: torch.Tensor, keys: PagedKeys, kept: Sequence[torch.Tensor], search: DecodeSearch
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Select the leaves that one request's newest token reads (InfiniteHiP, arXiv 2502.08910, section 3).

    The search is that of `hierarchical_descent`, of which the first stages may be skipped: `kept` holds what they kept
    at an earlier step. So that this fits, all steps between two multiples of `search.first_refresh_steps` share the
    search range of the first of them: it ends `search.window_tokens` before the newest token of that step. There the
    window starts, and grows with every step until the next multiple. So each token is either in the window or in the
    search range.

    With a `search.mass_scale` the last stage scores a key block by the attention that the query heads of the KV head
    pay to all of its keys, by a softmax over the keys of its candidates, summed over the heads.

    Args:
        query: ``[query_heads, head_size]`` of the newest token.
        keys: the request's keys, the newest token's included.
        kept: what the first stages kept at a step since the last multiple of `search.first_refresh_steps`, as this
            function returns it; the other stages are searched.
        search: the stages and what is always kept.

    Returns:
        For each stage int64 ``[kv_heads, n]``, the first tokens of the key blocks that it keeps, ascending; and bool
        ``[kv_heads, ceil(context / LEAF_TOKENS)]``, the leaves.
    """
    return reference.decode_leaves(query, keys, kept, search)


def token_lists(rows: DecodeRows, knobs: torch.Tensor, memory: RowMemory, lists: TokenLists) -> None:
    """Select tokens for all decode rows of a layer, as `HipDecode` does for one request. Triton only; for CUDA graphs.

    A stage is searched if it is due by the row's knobs and context. All stages are if the row is fresh, or if the step
    before this one did not use the row's slot in this layer. The host knows none of this and checks nothing: the caller
    makes sure that `memory` and `lists` are as large as the rows' knobs need (`HipDecode.device_sizes`).

    Args:
        rows: the rows. A row that does not take part, with a context of 0 tokens, keeps its list and its slot.
        knobs: int32 ``[rows, >= ROW_KNOBS + STAGE_KNOBS * stages]`` (`HipDecode.row_knobs`), a row's adjacent in
            memory.
        memory: what the stages kept for the rows' requests in this layer; updated.
        lists: written.
    """
    from vllm_sparse.kernels.hip_decode import triton

    triton.token_lists(rows, knobs, memory, lists)
