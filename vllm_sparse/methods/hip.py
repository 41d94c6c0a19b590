"""HiP (arXiv 2406.09827) as InfiniteHiP (arXiv 2502.08910) has it: key chunks that descents to single keys find."""

from __future__ import annotations

import itertools
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass

from vllm_sparse.kernels.hierarchical_descent import LEAF_TOKENS, DescentArguments, Stage, hierarchical_descent
from vllm_sparse.keys import PagedKeys
from vllm_sparse.methods.base import (
    KNOBS,
    DenseLayers,
    DenseTail,
    KnobError,
    Layer,
    PrefillMethod,
    QueryBlock,
    Rows,
    ScoreHeads,
    SinkTokens,
    heads_with_scores,
)

UNBOUNDED_TOKENS = 1 << 24
LONGEST_STRIDE = 64

Integers = tuple[Annotated[int, Field(strict=True)], ...]
# Knobs of both phases.
StageChunks = Annotated[
    Integers,
    Field(description="tokens of a chunk in each stage, falling powers of two of 16 or more", strict=False),
]
StageTokens = Annotated[
    Integers, Field(description="tokens that each stage keeps, not rising, multiples of its chunk", strict=False)
]
DEFAULT_STAGE_CHUNKS = (256, 64, 16)
DEFAULT_STAGE_TOKENS = (32768, 8192, 2048)


def check_stages(stage_chunks: Integers, stage_tokens: Integers) -> None:
    """Check the stages of a search.

    Raises:
        KnobError: there are none, or they do not follow one another.
    """
    if not stage_chunks:
        raise KnobError("stage_chunks", [], "at least one stage is needed")
    check_one_each("stage_tokens", stage_tokens, stage_chunks)
    check_powers_of_two("stage_chunks", stage_chunks, LEAF_TOKENS, UNBOUNDED_TOKENS)
    if any(length <= shorter for length, shorter in itertools.pairwise(stage_chunks)):
        raise KnobError("stage_chunks", list(stage_chunks), "each must be below the one before it")
    check_not_rising("stage_tokens", stage_tokens)
    for tokens, length in zip(stage_tokens, stage_chunks, strict=True):
        if not length <= tokens <= UNBOUNDED_TOKENS or tokens % length:
            raise KnobError(
                "stage_tokens",
                list(stage_tokens),
                f"multiples of the chunk, here {length}, up to {UNBOUNDED_TOKENS} are allowed",
            )


def check_one_each(knob: str, values: Integers, stage_chunks: Integers) -> None:
    """Check that a knob has a number for each stage.

    Raises:
        KnobError: it has more or less.
    """
    if len(values) != len(stage_chunks):
        raise KnobError(knob, list(values), f"one number for each of the {len(stage_chunks)} stages is needed")


def check_powers_of_two(knob: str, values: Integers, least: int, most: int) -> None:
    """Check the numbers of a knob.

    Raises:
        KnobError: one is no power of two, or out of range.
    """
    if not all(least <= value <= most and value.bit_count() == 1 for value in values):
        raise KnobError(knob, list(values), f"powers of two from {least} to {most} are allowed")


def check_not_rising(knob: str, values: Integers) -> None:
    """Check that the numbers of a knob fall or stay from stage to stage.

    Raises:
        KnobError: one is above the one before it.
    """
    if any(value < following for value, following in itertools.pairwise(values)):
        raise KnobError(knob, list(values), "none may be above the one before it")


@dataclass(frozen=True, config=KNOBS)
class Hip(PrefillMethod):
    """Prune the keys in stages; each scores chunks by single keys that a descent picks, and keeps the best chunks.

    The descent and the search range of a query block stand with `hierarchical_descent`. Stage ``i`` cuts what is left
    into chunks of ``stage_chunks[i]`` tokens, averages ``query_stride[i]`` adjacent queries and keeps
    ``stage_tokens[i]`` tokens. Beside that a query block reads the first `sink` tokens, the `window` tokens before it
    and its own; those that hold one of the last `dense_tail` queries of a chunk read everything. With ``dense_tail=0``
    and chunks of the prompt that start at multiples of `query_block`, the choice is the same for every chunking.

    Scores are plain products, of heads that share a list (`heads`) the largest, as in the official code. Heads with
    large queries weigh more in it; only the order of chunks is at stake. With tensor parallelism ``heads="layer"``
    means the heads of one rank. The last chunk of the paper has 8 tokens, here 16, the smallest page. The paper's
    query blocks have 64 queries, of which the last stage averages none; 128, averaged by fours, cost a quarter of it.
    """

    name: ClassVar[str] = "hip"
    page_tokens: ClassVar[int] = LEAF_TOKENS

    stage_chunks: StageChunks = DEFAULT_STAGE_CHUNKS
    stage_tokens: StageTokens = DEFAULT_STAGE_TOKENS
    query_stride: Annotated[
        Integers,
        Field(description="adjacent queries that each stage averages, powers of two of at most 64", strict=False),
    ] = (4, 4, 4)
    sink: SinkTokens = 256
    window: Annotated[int, Field(ge=0, le=1 << 16, description="tokens before a query block, always read")] = 1024
    dense_tail: DenseTail = 64
    heads: ScoreHeads = "kv_head"
    dense_layers: DenseLayers = 0
    query_block: QueryBlock = 128
    rows: Rows = "kv_head"

    def __post_init__(self) -> None:
        check_stages(self.stage_chunks, self.stage_tokens)
        check_one_each("query_stride", self.query_stride, self.stage_chunks)
        check_powers_of_two("query_stride", self.query_stride, 1, LONGEST_STRIDE)

    @property
    def exactly_dense(self) -> bool:
        return self.stage_tokens[-1] == UNBOUNDED_TOKENS

    def block_mask(self, query: torch.Tensor, keys: PagedKeys, scale: float, layer: Layer) -> torch.Tensor:
        stages = zip(self.stage_chunks, self.stage_tokens, self.query_stride, strict=True)
        arguments = DescentArguments(
            [Stage(length, tokens, stride) for length, tokens, stride in stages],
            self.query_block,
            heads_with_scores(self.heads, query.shape[1], keys.num_kv_heads),
            self.sink,
            self.window,
            self.dense_tail,
        )
        return hierarchical_descent(query, keys, arguments)
