"""Prompt chunks of several requests that choose together, beside each of them alone."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch

from tests import oracle
from tests.kernels.chunks import Span
from tests.methods.lists import SCALE
from tests.oracle import Paged, Platform
from vllm_sparse.methods.prefill import Layer, PrefillMethod
from vllm_sparse.pages import PageList, empty_lists
from vllm_sparse.step.chunks import PromptBlocks, PromptChunks, prompt_blocks

# Between the chunks of a step.
OTHER_TOKENS = 3
POISON = -12345


@dataclass(frozen=True)
class Step:
    """Prompt chunks of a step, and what a server knows of their prompts.

    Attributes:
        data: keys of each request.
        query: ``[step tokens, query_heads, head_size]``.
        spans: of the chunks.
        prompt_tokens: of each chunk's request.
    """

    data: Paged
    query: torch.Tensor
    spans: list[Span]
    prompt_tokens: list[int | None]

    def query_of(self, chunk: int) -> torch.Tensor:
        """``[query_tokens, query_heads, head_size]`` of a chunk."""
        span = self.spans[chunk]
        return self.query[span.query_start : span.query_start + span.query_tokens]

    def layer(self, chunk: int) -> Layer:
        """Where a chunk chooses: not in the first layer, not of the first heads."""
        return Layer(1, 0, self.prompt_tokens[chunk])


def random_step(
    platform: Platform, generator: torch.Generator, sizes: list[tuple[int, int]], heads: int, kv_heads: int
) -> Step:
    """Chunks of random queries and keys, whose queries lie apart and whose requests are in any order.

    Args:
        platform: of the tensors.
        generator: of the numbers.
        sizes: tokens of each chunk and of its context.
        heads: query heads.
        kv_heads: KV heads.
    """
    order = torch.randperm(len(sizes), generator=generator).tolist()
    contexts = [0] * len(sizes)
    for (_, context), row in zip(sizes, order, strict=True):
        contexts[row] = context
    data = oracle.random_paged(platform, generator, contexts, kv_heads, 32, 64)
    starts = itertools.accumulate((tokens + OTHER_TOKENS for tokens, _ in sizes), initial=OTHER_TOKENS)
    spans = [Span(row, start, *size) for row, start, size in zip(order, starts, sizes, strict=False)]
    # Beside keys and values, as a fused projection leaves them.
    tokens = spans[-1].query_start + spans[-1].query_tokens
    query = oracle.random_tensor(platform, generator, tokens, heads + 2, 32, spread=2)[:, :heads]
    prompts = [None if chunk % 2 else context + 100 * (chunk % 3) for chunk, (_, context) in enumerate(sizes)]
    return Step(data, query, spans, prompts)


def chunks_of(step: Step, method: PrefillMethod) -> tuple[PromptBlocks, PromptChunks]:
    """Query blocks and chunks of a step in a layer."""
    blocks = prompt_blocks(step.spans, method.query_block_tokens, step.query.device)
    keys = tuple(step.data.reader(span.row) for span in step.spans)
    return blocks, PromptChunks(blocks, step.query, keys, step.data.block_table, SCALE)


def select_together(method: PrefillMethod, step: Step, page: int) -> list[PageList]:
    """Lists of each chunk, written over what is no page."""
    heads, kv_heads = step.query.shape[1], step.data.num_kv_heads
    blocks, chunks = chunks_of(step, method)
    list_heads = method.list_heads(heads, kv_heads)
    width = -(-blocks.longest_seq_len // page)
    lists = empty_lists(list_heads * blocks.blocks, width, page, step.query.device)
    lists.pages.fill_(POISON)
    lists.kept_tokens.fill_(POISON)
    layers = [step.layer(chunk) for chunk in range(len(step.spans))]
    method.select_chunks(chunks, layers, method.prepare(blocks, step.prompt_tokens), lists)
    rows = [blocks.lists_of(chunk, list_heads) for chunk in range(len(step.spans))]
    return [PageList(lists.pages[of_chunk], lists.kept_tokens[of_chunk], page) for of_chunk in rows]


def select_alone(method: PrefillMethod, step: Step, page: int) -> list[PageList]:
    """Lists of each chunk as `select` gives them for it alone."""
    return [
        method.select(step.query_of(chunk), step.data.reader(span.row), SCALE, page, step.layer(chunk))
        for chunk, span in enumerate(step.spans)
    ]


def differing_lists(found: PageList, wanted: PageList) -> int:
    """Lists that are not the same where they are live."""
    assert found.kept_tokens.shape == wanted.kept_tokens.shape
    return sum(
        int(found.kept_tokens[row]) != int(wanted.kept_tokens[row])
        or oracle.live_pages(found, row) != oracle.live_pages(wanted, row)
        for row in range(found.kept_tokens.shape[0])
    )
