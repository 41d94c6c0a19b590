"""DHSA (arXiv 2510.24606): per query block, the key blocks whose mean key is most like its mean query."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass

from vllm_sparse.kernels.adaptive_blocks import adaptive_blocks
from vllm_sparse.kernels.block_scores import KeyBlocks, PageSelection, kept_pages
from vllm_sparse.kernels.page_list import query_blocks
from vllm_sparse.kernels.page_summaries import SummaryKind, page_summaries
from vllm_sparse.keys import PagedKeys
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
from vllm_sparse.methods.prefill import Layer, PrefillMethod, tokens_with_dense_tail

# The key block of the paper's second version. Finer pages double the score map and the lists, while the executor gains
# nothing: key blocks of 16 give each page the better of two.
PAGE_TOKENS = 32


@dataclass(frozen=True, config=KNOBS)
class Dhsa(PrefillMethod):
    """Score key blocks by length-normalised means, give the scores to their tokens, keep the best up to a budget.

    The budget of a query block is `budget_tokens`, or `density` of the context where `budget_tokens` is 0; it counts
    the forced tokens and is rounded up to pages. Forced are the first `sink_tokens` and all tokens from
    `recent_tokens` before the query block to its last token. Query blocks that hold one of the last
    `dense_tail_tokens` queries of a prompt chunk read everything, and so do those whose whole past fits the budget.

    ``key_blocks="page"`` cuts the keys every `key_block_tokens`, as the paper's second version does; ``"adaptive"``
    cuts them where they change most, as the first version's trained predictor would (`boundary_threshold` is its
    knob, `key_block_tokens` the other's). A key block competes once it lies wholly in a query block's past and its end
    is decided; until then it is forced. So later tokens change no choice, and with `budget_tokens`,
    ``dense_tail_tokens=0`` and prompt chunks that start at multiples of `query_block_tokens`, the choice is the same
    for every chunking, up to rounding of the scores.

    The paper's first version has one list for all heads of a layer: ``scores_per="layer"``, which scores mean queries
    of all heads against mean keys of all heads. With tensor parallelism these are the heads of one rank, and so are
    those that adaptive boundaries look at. Lists shared over layers are not offered.
    """

    name: ClassVar[str] = "dhsa"
    page_tokens: ClassVar[int] = PAGE_TOKENS
    former_names: ClassVar[dict[str, str]] = {
        "budget": "budget_tokens",
        "chunks": "key_blocks",
        "chunk": "key_block_tokens",
        "sink": "sink_tokens",
        "local": "recent_tokens",
        "dense_tail": "dense_tail_tokens",
        "heads": "scores_per",
        "query_block": "query_block_tokens",
        "rows": "list_per",
    }

    key_blocks: Annotated[
        Literal["page", "adaptive"], Field(description="cut keys at fixed lengths, or where they change"), COMPILES
    ] = "page"
    key_block_tokens: Annotated[
        Literal[16, 32, 64, 128], Field(description="tokens of a key block of fixed length"), COMPILES
    ] = 32
    boundary_threshold: Annotated[
        float, Field(ge=0, le=2, allow_inf_nan=False, description="least 1 - cosine of the keys around a boundary")
    ] = 0.1
    density: Annotated[
        float, Field(gt=0, le=1, allow_inf_nan=False, description="share of the context that a query block reads")
    ] = 0.125
    budget_tokens: Annotated[
        int,
        Field(ge=0, le=UNBOUNDED_TOKENS, description="tokens that a query block reads, in place of density; 0: off"),
        LIMITED_BUDGET,
    ] = 0
    sink_tokens: SinkTokens = 128
    recent_tokens: Annotated[
        int, Field(ge=0, le=1 << 16, description="tokens before a query block, always read"), LIMITED_BUDGET
    ] = 128
    dense_tail_tokens: DenseTailTokens = 64
    scores_per: ScoresPer = "query_head"
    dense_layers: DenseLayers = 0
    query_block_tokens: QueryBlockTokens = 128
    list_per: ListPer = "query_head"

    @property
    def exactly_dense(self) -> bool:
        return self.budget_tokens == UNBOUNDED_TOKENS or (self.budget_tokens == 0 and self.density >= 1)

    def read_tokens(self, query_tokens: int, seq_len: int) -> float:
        block = self.query_block_tokens
        kept = max(self.budget_tokens or self.density * seq_len, self.sink_tokens + self.recent_tokens + block)
        tail = -(-self.dense_tail_tokens // block) * block
        return tokens_with_dense_tail(kept, tail, query_tokens, seq_len)

    def block_mask(self, query: torch.Tensor, keys: PagedKeys, scale: float, layer: Layer) -> torch.Tensor:
        context = keys.seq_len
        key_chunks = self.key_chunks(keys)
        first_query, last_query = query_blocks(query.shape[0], context, self.query_block_tokens, query.device)
        decided = (last_query + 1 - key_chunks.look_ahead_tokens).clamp(min=0)
        open_chunk = torch.searchsorted(key_chunks.start, decided, right=True) - 1
        band_start = torch.minimum((first_query - self.recent_tokens).clamp(min=0), key_chunks.start[open_chunk])
        selection = PageSelection(
            self.query_block_tokens,
            PAGE_TOKENS,
            heads_with_scores(self.scores_per, query.shape[1], keys.num_kv_heads),
            self.sink_tokens,
            self.budget_tokens or math.ceil(self.density * context),
        )
        band_start = band_start.masked_fill(last_query >= context - self.dense_tail_tokens, 0)
        return kept_pages(query, key_chunks, context, band_start, selection)

    def key_chunks(self, keys: PagedKeys) -> KeyBlocks:
        """The context's keys in key blocks, as the knobs say."""
        if self.key_blocks == "adaptive":
            return adaptive_blocks(keys, self.boundary_threshold)
        mean = page_summaries(keys, SummaryKind(self.key_block_tokens, "mean"))
        start = torch.arange(0, (mean.shape[1] + 1) * self.key_block_tokens, self.key_block_tokens, device=mean.device)
        length = (keys.seq_len - start[:-1]).clamp(max=self.key_block_tokens)
        return KeyBlocks(mean * length.sqrt().unsqueeze(1), start, 0)
