"""Tables of FlexPrefill's sample that no layer changes: where the sampled queries lie, and the key blocks they meet."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from vllm_sparse.step.chunks import PromptBlocks, int_tables, last_blocks

# Key blocks that one program compares with its rows.
SEGMENT_BLOCKS = 16


@dataclass(frozen=True)
class Samples:
    """The last queries of prompt chunks, and the key blocks of the chunks' contexts.

    Attributes:
        queries: the sampled queries, one query block a chunk.
        key_block_tokens: tokens of a key block, and most sampled queries of a chunk.
        starts: first key block of each chunk among those of all chunks, and the number of all, on the host.
        segment_starts: first segment of each chunk, and the number of all, on the host. A segment is `SEGMENT_BLOCKS`
            adjacent key blocks of one chunk, or the rest of its context.
        key_start: int32 ``[chunks + 1]`` as `starts`.
        segment_chunk: int32 ``[segments]`` chunk of each segment.
        segment_block: int32 ``[segments]`` its first key block in the context.
        first_key_block: int32 ``[chunks, key_blocks of the longest context]`` each key block's own number, 1 past the
            context, as `chunk_page_scores` takes it.
        last_key_block: likewise, 0 past the context.
    """

    queries: PromptBlocks
    key_block_tokens: int
    starts: tuple[int, ...]
    segment_starts: tuple[int, ...]
    key_start: torch.Tensor
    segment_chunk: torch.Tensor
    segment_block: torch.Tensor
    first_key_block: torch.Tensor
    last_key_block: torch.Tensor

    @property
    def key_blocks(self) -> int:
        """Key blocks of the longest context."""
        return self.first_key_block.shape[1]

    def key_blocks_of(self, chunk: int) -> int:
        """Key blocks of a chunk's context."""
        return self.starts[chunk + 1] - self.starts[chunk]


def last_queries(blocks: PromptBlocks, key_block_tokens: int) -> Samples:
    """Tables of the sample of prompt chunks.

    Args:
        blocks: query blocks of the chunks.
        key_block_tokens: tokens of a key block, and most sampled queries of a chunk.
    """
    counts = np.array([-(-span.seq_len // key_block_tokens) for span in blocks.spans])
    segments = -(-counts // SEGMENT_BLOCKS)
    starts, segment_starts = (np.cumsum([0, *lengths]) for lengths in (counts, segments))
    segment_chunk = np.repeat(np.arange(len(counts)), segments)
    segment_block = (np.arange(segment_starts[-1]) - segment_starts[segment_chunk]) * SEGMENT_BLOCKS
    key_block = np.arange(counts.max())
    in_context = key_block < counts[:, None]
    first, last = np.where(in_context, key_block, 1), np.where(in_context, key_block, 0)
    key_start, chunk_table, block_table, first_key_block, last_key_block = int_tables(
        (starts, segment_chunk, segment_block, first.ravel(), last.ravel()), blocks.chunk.device
    )
    return Samples(
        last_blocks(blocks, key_block_tokens),
        key_block_tokens,
        tuple(starts.tolist()),
        tuple(segment_starts.tolist()),
        key_start,
        chunk_table,
        block_table,
        first_key_block.view(first.shape),
        last_key_block.view(last.shape),
    )
