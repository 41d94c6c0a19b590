"""The tokens of decode rows with the most attention by their keys' codes, as token lists: on a GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from vllm_sparse.kernels.top_tokens import top_tokens

if TYPE_CHECKING:
    import torch

    from vllm_sparse.kernels.page_summaries import SummaryKind
    from vllm_sparse.step.rows import DecodeRows, RowsPlace, TokenLists


def top_coded_tokens(
    rows: DecodeRows, knobs: torch.Tensor, kind: SummaryKind, place: RowsPlace, lists: TokenLists
) -> None:
    """Select each row's tokens by `kernels.code_scores`, and those of a last page that is not full; write their slots.

    Codes of the pages that rows' newest tokens fill are stored before. In two CUDA launches where the kernels of csrc/
    are installed and hold the model's heads, else in Triton, which takes several times as long.

    Args:
        rows: the rows; those with a context of 0 keep their lists.
        knobs: int32 ``[rows, 3]`` budget, sink and recent tokens of each row.
        kind: with codes; its pages divide the cache's blocks.
        place: where scores have room, the summaries, and the rows whose pages are coded.
        lists: written.
    """
    # Imported here: there is Triton only where there is a GPU.
    from vllm_sparse.kernels.code_scores.triton import code_scores_of_rows
    from vllm_sparse.kernels.page_summaries.triton import store_newest_summaries
    from vllm_sparse.kernels.top_coded_tokens import cuda

    assert place.summaries is not None
    is_cuda = cuda.can_run(rows, kind)
    # A block may hold full pages that a former request's codes stand for, unless it is a page itself.
    if not is_cuda or kind.page_tokens < rows.kv_cache.shape[2]:
        store_newest_summaries(replace(rows, seq_lens=place.members), kind, place.summaries)
    if is_cuda:
        cuda.top_coded_tokens(rows, knobs, kind, place, lists)
    else:
        scores = code_scores_of_rows(rows, kind, place.summaries, place.starts, place.capacity_tokens)
        forced = knobs.clone()
        forced[:, 2] = knobs[:, 2].maximum(rows.seq_lens % kind.page_tokens)
        top_tokens(scores, rows, forced, lists)
