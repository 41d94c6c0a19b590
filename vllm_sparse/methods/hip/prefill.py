"""HiP (arXiv 2406.09827) as InfiniteHiP (arXiv 2502.08910) has it: key blocks that descents to single keys find."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass

from vllm_sparse.kernels.hierarchical_descent import (
    LEAF_TOKENS,
    DescentArguments,
    SearchRanges,
    Stage,
    hierarchical_descents,
    scratch_bytes,
    search_ranges,
)
from vllm_sparse.kernels.page_list import write_lists
from vllm_sparse.keys import PagedKeys
from vllm_sparse.methods.hip.stages import (
    DEFAULT_STAGE_BLOCK_TOKENS,
    DEFAULT_STAGE_BUDGET_TOKENS,
    Integers,
    StageBlockTokens,
    StageBudgetTokens,
    check_one_each,
    check_powers_of_two,
    check_stages,
)
from vllm_sparse.methods.knobs import (
    COMPILES,
    KNOBS,
    LIMITED_BUDGET,
    UNBOUNDED_TOKENS,
    DenseLayers,
    DenseTailTokens,
    ListPer,
    QueryBlockTokens,
    ScoresPer,
    SinkTokens,
    heads_with_scores,
)
from vllm_sparse.methods.prefill import Layer, PrefillMethod, shared, tokens_with_dense_tail
from vllm_sparse.pages import PageList
from vllm_sparse.step.chunks import PromptBlocks, PromptChunks, chunk_alone

LONGEST_STRIDE = 64


@dataclass(frozen=True, config=KNOBS)
class Hip(PrefillMethod):
    """Prune the keys in stages; each scores key blocks by single keys that a descent picks, and keeps the best.

    The descent and the search range of a query block stand with `hierarchical_descents`. Stage ``i`` cuts what is left
    into key blocks of ``stage_block_tokens[i]``, averages ``query_stride[i]`` adjacent queries and keeps
    ``stage_budget_tokens[i]``. Beside that a query block reads the first `sink_tokens`, the `recent_tokens` before it
    and its own tokens; query blocks that hold one of the last `dense_tail_tokens` queries of a prompt chunk read
    everything. With ``dense_tail_tokens=0`` and prompt chunks that start at multiples of `query_block_tokens`, the
    choice is the same for every chunking.

    Scores are plain products, of heads that share them (`scores_per`) the largest, as in the official code. Heads with
    large queries weigh more in it; only the order of key blocks is at stake. With tensor parallelism
    ``scores_per="layer"`` means the heads of one rank. The last key block of the paper has 8 tokens, here 16, the
    smallest page. The paper's query blocks have 64 queries, of which the last stage averages none; 128, averaged by
    fours, cost a quarter of it.
    """

    name: ClassVar[str] = "hip"
    page_tokens: ClassVar[int] = LEAF_TOKENS
    former_names: ClassVar[dict[str, str]] = {
        "stage_chunks": "stage_block_tokens",
        "stage_tokens": "stage_budget_tokens",
        "sink": "sink_tokens",
        "window": "recent_tokens",
        "dense_tail": "dense_tail_tokens",
        "heads": "scores_per",
        "query_block": "query_block_tokens",
        "rows": "list_per",
    }

    stage_block_tokens: StageBlockTokens = DEFAULT_STAGE_BLOCK_TOKENS
    stage_budget_tokens: StageBudgetTokens = DEFAULT_STAGE_BUDGET_TOKENS
    query_stride: Annotated[
        Integers,
        Field(description="adjacent queries that each stage averages, powers of two of at most 64", strict=False),
        COMPILES,
    ] = (4, 4, 4)
    sink_tokens: SinkTokens = 256
    recent_tokens: Annotated[
        int, Field(ge=0, le=1 << 16, description="tokens before a query block, always read"), LIMITED_BUDGET
    ] = 1024
    dense_tail_tokens: DenseTailTokens = 64
    scores_per: ScoresPer = "kv_head"
    dense_layers: DenseLayers = 0
    query_block_tokens: QueryBlockTokens = 128
    list_per: ListPer = "kv_head"

    def __post_init__(self) -> None:
        check_stages(self.stage_block_tokens, self.stage_budget_tokens)
        check_one_each("query_stride", self.query_stride, self.stage_block_tokens)
        check_powers_of_two("query_stride", self.query_stride, 1, LONGEST_STRIDE)

    @property
    def exactly_dense(self) -> bool:
        return self.stage_budget_tokens[-1] == UNBOUNDED_TOKENS

    def read_tokens(self, query_tokens: int, seq_len: int) -> float:
        block = self.query_block_tokens
        kept = self.stage_budget_tokens[-1] + self.sink_tokens + self.recent_tokens + block
        tail = -(-self.dense_tail_tokens // block) * block
        return tokens_with_dense_tail(kept, tail, query_tokens, seq_len)

    def selection_bytes(self, query_tokens: int, seq_len: int, query_heads: int, kv_heads: int) -> int:
        lists = super().selection_bytes(query_tokens, seq_len, query_heads, kv_heads)
        heads = heads_with_scores(self.scores_per, query_heads, kv_heads)
        # The last query block of each chunk may be short.
        blocks = query_tokens // self.query_block_tokens + self.most_chunks(query_tokens)
        leaves = -(-seq_len // LEAF_TOKENS)
        return lists + heads * blocks * leaves + scratch_bytes(blocks, leaves, heads)

    def selection_work(self, seq_len: int, query_heads: int, kv_heads: int) -> float:
        # Each stage scores a key of each block of what the stage before it kept, with the averaged queries.
        reached = [seq_len, *(min(tokens, seq_len) for tokens in self.stage_budget_tokens)]
        stages = zip(reached, self.stage_block_tokens, self.query_stride, strict=False)
        scores = sum(tokens / length / stride for tokens, length, stride in stages)
        heads = heads_with_scores(self.scores_per, query_heads, kv_heads), self.list_heads(query_heads, kv_heads)
        return scores * max(heads) / self.query_block_tokens

    def block_mask(self, query: torch.Tensor, keys: PagedKeys, scale: float, layer: Layer) -> torch.Tensor:
        chunk = chunk_alone(query, keys, scale, self.query_block_tokens)
        return self._leaves(chunk, search_ranges(chunk.blocks, self._arguments))

    def prepare(self, blocks: PromptBlocks, prompt_tokens: Sequence[int | None]) -> SearchRanges:
        return search_ranges(blocks, self._arguments)

    def select_chunks(self, chunks: PromptChunks, layers: Sequence[Layer], prepared: Any, lists: PageList) -> None:
        list_heads = lists.kept_tokens.shape[0] // chunks.blocks.blocks
        mask = shared(self._leaves(chunks, prepared), list_heads)
        write_lists(mask, chunks.blocks, LEAF_TOKENS, list_heads, lists)

    @property
    def _arguments(self) -> DescentArguments:
        stages = zip(self.stage_block_tokens, self.stage_budget_tokens, self.query_stride, strict=True)
        return DescentArguments(
            [Stage(length, tokens, stride) for length, tokens, stride in stages],
            self.query_block_tokens,
            self.sink_tokens,
            self.recent_tokens,
            self.dense_tail_tokens,
        )

    def _leaves(self, chunks: PromptChunks, ranges: SearchRanges) -> torch.Tensor:
        """Kept leaves of the chunks: bool ``[heads that share scores, blocks, leaves]``."""
        heads = heads_with_scores(self.scores_per, chunks.query.shape[1], chunks.keys[0].num_kv_heads)
        return hierarchical_descents(chunks, ranges, self._arguments, heads)
