"""What the layers of a step share of HiP's selection: search ranges of query blocks, and the stages that prune them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vllm_sparse.kernels.hierarchical_descent.reference import (
    DescentArguments,
    Stage,
    candidates,
    pruning_stages,
    search_start,
    search_stop,
)
from vllm_sparse.step.chunks import PromptBlocks, held_at_once, int_tables

# Scores and kept key blocks of query blocks that are searched together; if it is short, they take several launches.
SCRATCH_BYTES = 1 << 28


@dataclass(frozen=True)
class SearchRanges:
    """Search ranges of the query blocks of prompt chunks.

    Attributes:
        stages: those that prune the longest range. Of a shorter range the first of them may prune nothing: they keep
            all of its key blocks, which the next one splits as if it were the first.
        range_tokens: of the longest range.
        end: int32 ``[blocks]`` token after each query block's range, 0 where it keeps everything.
    """

    stages: tuple[Stage, ...]
    range_tokens: int
    end: torch.Tensor


def search_ranges(blocks: PromptBlocks, arguments: DescentArguments) -> SearchRanges:
    """Search ranges of query blocks.

    Args:
        blocks: of the prompt chunks.
        arguments: of the search.
    """
    stops = [
        search_stop(span.query_tokens, span.seq_len, blocks.query_block_tokens, arguments.window_tokens)
        for span in blocks.spans
    ]
    range_tokens = max(stops) - search_start(arguments.sink_tokens)
    first, last = blocks.positions
    dense_from = np.repeat(
        [span.seq_len - arguments.dense_tail_tokens for span in blocks.spans], np.diff(blocks.starts)
    )
    end = np.where(last >= dense_from, 0, np.maximum(first - arguments.window_tokens, 0))
    (table,) = int_tables([end], blocks.chunk.device)
    return SearchRanges(tuple(pruning_stages(arguments.stages, range_tokens)), range_tokens, table)


def entries_of_search(pruning: Sequence[Stage], range_tokens: int) -> tuple[int, int]:
    """Most scores that a search holds, and entries of what a stage keeps in it: a number and that many key blocks.

    Args:
        pruning: the stages, at least one.
        range_tokens: of the longest range.
    """
    return max(candidates(pruning, range_tokens)), 1 + max(stage.kept_key_blocks for stage in pruning)


def search_bytes(scores: int, kept: int) -> int:
    """Memory of a search of one list: of what is kept it holds that of two stages; arguments as `entries_of_search`."""
    return 4 * (scores + 2 * kept)


def scratch_bytes(blocks: int, leaves: int, heads: int) -> int:
    """Memory that `hierarchical_descents` takes on a GPU between its launches at the most, whatever the stages.

    Args:
        blocks: query blocks of the prompt chunks.
        leaves: of the longest context.
        heads: lists per query block.
    """
    return held_at_once(blocks, heads * search_bytes(leaves, 1 + leaves), SCRATCH_BYTES)
