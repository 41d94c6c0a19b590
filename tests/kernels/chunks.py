"""Prompt chunks of several requests, as a step's kernels meet them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_sparse.step.chunks import PromptBlocks, prompt_blocks


@dataclass(frozen=True)
class Span:
    """A request's place in a step."""

    row: int
    query_start: int
    query_tokens: int
    seq_len: int


# Apart from one another in the step, of other lengths, one short, one a whole prompt, one longer than a tile.
SPANS = (Span(3, 5, 300, 1000), Span(0, 310, 70, 70), Span(7, 400, 129, 2600), Span(4, 529, 1, 33))
STEP_TOKENS = 540


def some_chunks(query_block_tokens: int, device: str) -> PromptBlocks:
    """Their query blocks."""
    return prompt_blocks(SPANS, query_block_tokens, torch.device(device))
