"""SALE (arXiv 2505.24179): score keys with few-bit integers, keep pages that nearby attention does not dwarf."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass

from vllm_sparse.kernels.low_bit_scores import (
    PAGE_TOKENS,
    LowBitScoring,
    MiddlePages,
    kept_maps,
    middle_pages,
    scratch_bytes,
)
from vllm_sparse.kernels.page_list import write_lists
from vllm_sparse.keys import PagedKeys
from vllm_sparse.methods.knobs import COMPILES, KNOBS, LIMITED_BUDGET, DenseLayers, KnobError, ListPer, QueryBlockTokens
from vllm_sparse.methods.prefill import Layer, PrefillMethod, density_at, mean_reach, shared
from vllm_sparse.methods.sale.thresholds import load, log_thresholds
from vllm_sparse.pages import PageList
from vllm_sparse.step.chunks import PromptBlocks, PromptChunks, chunk_alone

DEFAULT_TAU = 0.004
# Density at 8K, where 4096 keys are in reach on average, was 0.49 at the default, 0.31 at 0.02 and 0.23 at 0.05; at 32K
# it was 0.32, 0.19 and 0.14, means over chunks (Qwen2.5-Coder-0.5B, docs/methods.md): a fall by the logarithm of tau
# and by this power of the keys in reach.
DENSITY_AT_DEFAULT_TAU, DENSITY_BY_TAU, DENSITY_BY_REACH = 0.49, 0.11, 0.45


@dataclass(frozen=True, config=KNOBS)
class Sale(PrefillMethod):
    """Keep a page of 32 keys if one of them scores at least `tau` of a row's attention to the sink and local window.

    The score is the paper's Relative Attention Score: ``exp(score - m) / l``, with the row's largest score `m` and its
    sum `l` over the first `sink_tokens` and the last `recent_tokens`, which are always kept and scored exactly. All
    other keys are scored by integers: in the paper's groups, but less the mean of their page, whose share is added
    exactly, where the paper removes a mean that looks into the future. A page is kept if one row of the query block
    asks for it.

    With 8 bits each score is raised by what its rounding may hide, so no key with a probability of `tau` or more is
    ever dropped: the score is relative to a part of the keys and thus at least the probability. 4 bits are the paper's
    and promise nothing; Hopper has no 4-bit tensor cores, so they cost as much. `page_bounds` decides pages by their
    mean key and the distance of the farthest key from it where that is enough, and scores only the others; it drops no
    page in which an exact score passes.

    The choice looks at single rows, so it does not depend on the chunking if chunks start at multiples of
    `query_block_tokens`.
    """

    name: ClassVar[str] = "sale"
    page_tokens: ClassVar[int] = PAGE_TOKENS
    server_knobs: ClassVar[tuple[str, ...]] = ("calibration",)
    former_names: ClassVar[dict[str, str]] = {
        "sink": "sink_tokens",
        "local": "recent_tokens",
        "query_block": "query_block_tokens",
        "rows": "list_per",
    }

    tau: Annotated[
        float | None,
        Field(
            ge=0,
            le=1e6,
            allow_inf_nan=False,
            description="share of the attention to sink and local window that keeps a key; 0 keeps all; by default "
            f"the calibrated thresholds, {DEFAULT_TAU} where there are none",
        ),
    ] = None
    bits: Annotated[
        Literal[4, 8], Field(description="of the integers; 8 never loses a key, 4 is the paper's"), COMPILES
    ] = 8
    page_bounds: Annotated[
        bool, Field(description="score only keys of pages that the mean key leaves open"), COMPILES
    ] = True
    sink_tokens: Annotated[
        int,
        Field(ge=32, le=1 << 16, multiple_of=32, description="first tokens, always read; a multiple of 32"),
        LIMITED_BUDGET,
    ] = 32
    recent_tokens: Annotated[
        int, Field(ge=0, le=1 << 16, description="tokens to the end of a query block, always read"), LIMITED_BUDGET
    ] = 128
    calibration: Annotated[
        str, Field(description="file of thresholds per layer and head, from vllm-sparse calibrate sale")
    ] = ""
    dense_layers: DenseLayers = 0
    query_block_tokens: QueryBlockTokens = 64
    list_per: ListPer = "query_head"

    def __post_init__(self) -> None:
        if self.calibration:
            try:
                load(self.calibration)
            except ValueError as error:
                raise KnobError("calibration", self.calibration, str(error)) from error

    @property
    def weighs_masses(self) -> bool:
        return True

    @property
    def exactly_dense(self) -> bool:
        return self.tau == 0

    @property
    def fingerprint(self) -> str:
        return load(self.calibration).digest if self.calibration else ""

    def check_defaults(self, num_layers: int, num_query_heads: int) -> None:
        if not self.calibration:
            return
        if self.tau is not None:
            raise KnobError(
                "tau", self.tau, f"calibration {self.calibration!r} would never be used beside it; drop one of the two"
            )
        found = load(self.calibration).contents
        if (found.layers, found.heads) != (num_layers, num_query_heads):
            raise KnobError(
                "calibration",
                self.calibration,
                f"the file holds {found.layers} layers of {found.heads} query heads, of {found.model}; the model has "
                f"{num_layers} layers of {num_query_heads}",
            )

    def read_tokens(self, query_tokens: int, seq_len: int) -> float:
        # Calibrated thresholds are to keep what the default does.
        tau = DEFAULT_TAU if self.tau is None else self.tau
        density = DENSITY_AT_DEFAULT_TAU - DENSITY_BY_TAU * math.log(tau / DEFAULT_TAU) if tau > 0 else 1.0
        reach = mean_reach(query_tokens, seq_len)
        if tau > 0:
            density = density_at(reach, density, DENSITY_BY_REACH)
        kept = max(density, 0.0) * reach
        return min(max(kept, self.sink_tokens + self.recent_tokens + self.query_block_tokens), reach)

    def selection_bytes(self, query_tokens: int, seq_len: int, query_heads: int, kv_heads: int) -> int:
        lists = super().selection_bytes(query_tokens, seq_len, query_heads, kv_heads)
        chunks = self.most_chunks(query_tokens)
        return lists + scratch_bytes(chunks, -(-seq_len // PAGE_TOKENS), kv_heads)

    def block_mask(self, query: torch.Tensor, keys: PagedKeys, scale: float, layer: Layer) -> torch.Tensor:
        """Kept pages of 32 tokens, perhaps some of the future: bool ``[query_heads, query_blocks, pages]``."""
        chunk = chunk_alone(query, keys, scale, self.query_block_tokens)
        return self._maps(chunk, middle_pages(chunk.blocks, self._scoring), layer)

    def prepare(self, blocks: PromptBlocks, prompt_tokens: Sequence[int | None]) -> MiddlePages:
        return middle_pages(blocks, self._scoring)

    def select_chunks(self, chunks: PromptChunks, layers: Sequence[Layer], prepared: Any, lists: PageList) -> None:
        list_heads = lists.kept_tokens.shape[0] // chunks.blocks.blocks
        mask = shared(self._maps(chunks, prepared, layers[0]), list_heads)
        write_lists(mask, chunks.blocks, PAGE_TOKENS, list_heads, lists)

    @property
    def _scoring(self) -> LowBitScoring:
        return LowBitScoring(self.bits, self.page_bounds, self.sink_tokens, self.recent_tokens, self.query_block_tokens)

    def _maps(self, chunks: PromptChunks, middle: MiddlePages, layer: Layer) -> torch.Tensor:
        """Kept pages of the chunks in a layer, which is the same for all of them."""
        thresholds = _log_thresholds(self.thresholds(layer, chunks.query.shape[1]), chunks.query.device)
        return kept_maps(chunks, middle, thresholds, self._scoring)

    def thresholds(self, layer: Layer, query_heads: int) -> tuple[float, ...]:
        """Threshold of each of this process's query heads in a layer.

        Raises:
            ValueError: the calibration file is of another model.
        """
        if self.tau is not None or not self.calibration:
            return (DEFAULT_TAU if self.tau is None else self.tau,) * query_heads
        found = load(self.calibration).contents
        last_head = layer.first_query_head + query_heads
        if layer.index >= found.layers or last_head > found.heads:
            raise ValueError(
                f"{self.calibration} holds thresholds of {found.layers} layers of {found.heads} query heads; "
                f"those of heads {layer.first_query_head} to {last_head - 1} of layer {layer.index} are asked for"
            )
        return tuple(found.thresholds[layer.index][layer.first_query_head : last_head])


@functools.lru_cache(maxsize=4096)
def _log_thresholds(taus: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """As `log_thresholds`, kept on the device."""
    return log_thresholds(taus, device)
