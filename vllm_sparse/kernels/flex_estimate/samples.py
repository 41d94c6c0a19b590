"""Tables of FlexPrefill's sample that no layer changes: where the sampled queries lie, and the key blocks they meet."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from vllm_sparse.step.chunks import PromptBlocks, int_tables, last_blocks, regrouped, stretches

# Key blocks that one program compares with its rows.
SEGMENT_BLOCKS = 16


@dataclass(frozen=True)
class Samples:
    """The last queries of stretches of prompt chunks, and the key blocks of their contexts.

    A chunk is one stretch, unless it is cut (`vllm_sparse.step.chunks.stretches`).

    Attributes:
        queries: the sampled queries, one query block a stretch, with stretches as chunks.
        of_chunks: the same query blocks with the step's chunks as chunks.
        served: the step's query blocks, for which the samples stand, with stretches as chunks.
        key_block_tokens: tokens of a key block, and most sampled queries of a stretch.
        starts: first key block of each stretch among those of all, and the number of all, on the host.
        segment_starts: first segment of each stretch, and the number of all, on the host. A segment is `SEGMENT_BLOCKS`
            adjacent key blocks of one stretch, or the rest of its context.
        key_start: int32 ``[stretches + 1]`` as `starts`.
        segment_stretch: int32 ``[segments]`` stretch of each segment.
        segment_block: int32 ``[segments]`` its first key block in the context.
        first_key_block: int32 ``[chunks, key_blocks of the longest context]`` each key block's own number, 1 past the
            context, as `chunk_page_scores` takes it.
        last_key_block: likewise, 0 past the context.
    """

    queries: PromptBlocks
    of_chunks: PromptBlocks
    served: PromptBlocks
    key_block_tokens: int
    starts: tuple[int, ...]
    segment_starts: tuple[int, ...]
    key_start: torch.Tensor
    segment_stretch: torch.Tensor
    segment_block: torch.Tensor
    first_key_block: torch.Tensor
    last_key_block: torch.Tensor

    @property
    def key_blocks(self) -> int:
        """Key blocks of the longest context."""
        return self.first_key_block.shape[1]

    def key_blocks_of(self, stretch: int) -> int:
        """Key blocks of a stretch's context."""
        return self.starts[stretch + 1] - self.starts[stretch]


def last_queries(blocks: PromptBlocks, key_block_tokens: int, every_tokens: int = 0) -> Samples:
    """Tables of the samples of prompt chunks.

    Args:
        blocks: query blocks of the chunks.
        key_block_tokens: tokens of a key block, and most sampled queries of a stretch.
        every_tokens: cut chunks where positions are multiples of so many tokens, a multiple of `key_block_tokens`, so
            that the mean keys of a stretch's context are those of its chunk's; 0: nowhere.
    """
    served, queries = blocks, last_blocks(blocks, key_block_tokens)
    of_chunks = queries
    if every_tokens:
        served, chunk = stretches(blocks, every_tokens)
        queries = last_blocks(served, key_block_tokens)
        of_chunks = regrouped(queries, blocks.spans, chunk)
    counts = _key_blocks(served, key_block_tokens)
    segments = -(-counts // SEGMENT_BLOCKS)
    starts, segment_starts = (np.cumsum([0, *lengths]) for lengths in (counts, segments))
    segment_stretch = np.repeat(np.arange(len(counts)), segments)
    segment_block = (np.arange(segment_starts[-1]) - segment_starts[segment_stretch]) * SEGMENT_BLOCKS
    key_block = np.arange(counts.max())
    in_context = key_block < _key_blocks(blocks, key_block_tokens)[:, None]
    first, last = np.where(in_context, key_block, 1), np.where(in_context, key_block, 0)
    key_start, stretch_table, block_table, first_key_block, last_key_block = int_tables(
        (starts, segment_stretch, segment_block, first.ravel(), last.ravel()), blocks.chunk.device
    )
    return Samples(
        queries,
        of_chunks,
        served,
        key_block_tokens,
        tuple(starts.tolist()),
        tuple(segment_starts.tolist()),
        key_start,
        stretch_table,
        block_table,
        first_key_block.view(first.shape),
        last_key_block.view(last.shape),
    )


def _key_blocks(blocks: PromptBlocks, key_block_tokens: int) -> np.ndarray:
    """Key blocks of each chunk's context: integer ``[chunks]``."""
    return np.array([-(-span.seq_len // key_block_tokens) for span in blocks.spans])
