"""HiP's selection for decode steps, with the results of stages kept from step to step."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vllm_sparse.kernels.hierarchical_descent import Stage
from vllm_sparse.kernels.hip_decode import reference
from vllm_sparse.kernels.hip_decode.memory import ROW_KNOBS, STAGE_KNOBS, HipMemory, StageMemory, StageScratch
from vllm_sparse.keys import PagedKeys
from vllm_sparse.step.rows import DecodeRows, TokenLists

__all__ = ["ROW_KNOBS", "STAGE_KNOBS", "HipMemory", "StageMemory", "StageScratch", "decode_leaves", "token_lists"]


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


def token_lists(
    rows: DecodeRows,
    knobs: torch.Tensor,
    slot: torch.Tensor,
    fresh: torch.Tensor,
    memory: StageMemory,
    scratch: StageScratch,
    lists: TokenLists,
) -> None:
    """Choose tokens for all decode rows of a layer as `HipDecode` does for one request. Triton; for CUDA graphs.

    Stages that are due by a row's knobs and context are searched anew, and all of them where the row is fresh or the
    step before did not use its slot in this layer. Nothing is known to the host, and nothing is checked: the caller
    sees to it that `memory`, `scratch` and `lists` hold what the rows' knobs ask for (`HipDecode.device_sizes`).

    Args:
        rows: the rows. One that does not take part, of 0 tokens, leaves its list and its slot as they are.
        knobs: int32 ``[rows, ROW_KNOBS + STAGE_KNOBS * stages or more]`` (`HipDecode.row_knobs`), a row's side by side.
        slot: int32 ``[rows]`` of each row's request in `memory`, none twice; anything for rows that do not take part.
        fresh: int32 ``[rows]``, as far apart as the slots: not 0 if the slot has got a new request since its last step.
        memory: of this layer, updated.
        scratch: of at least as many rows, overwritten.
        lists: written.
    """
    from vllm_sparse.kernels.hip_decode import triton

    triton.token_lists(rows, knobs, slot, fresh, memory, scratch, lists)
