"""TidalDecode (arXiv 2410.05076, ICLR 2025): choose tokens in a few layers, reuse the choice in the others."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass

from vllm_sparse.kernels.token_scores import token_scores
from vllm_sparse.keys import PagedKeys
from vllm_sparse.methods.base import KNOBS, DecodeMethod, KnobError, LayerMemory
from vllm_sparse.methods.top_pages import top_pages
from vllm_sparse.pages import PageList

# The paper's re-selection layer of a 32-layer Llama, scaled to a model's depth. Its two full layers are not scaled:
# choosing one layer earlier loses needles on the 8-layer bundled model.
PAPER_LAYERS, PAPER_RESELECT_LAYER = 32, 13


@dataclass(frozen=True, config=KNOBS)
class Tidal(DecodeMethod):
    """Position-persistent selection: a list is chosen in a full layer and lives for the rest of the decode step.

    Lists are per KV head by default, with the query heads of a group merged by the maximum of their attention
    probabilities; the paper's accuracy code has one per query head. Sink and recent tokens are forced into every
    list, which the paper does not do; 0 switches either off. The newest token is always read.
    """

    name: ClassVar[str] = "tidal"

    budget: Annotated[int, Field(ge=16, le=1 << 24, description="tokens read by a sparse layer")] = 2048
    full_layers: Annotated[int, Field(ge=0, le=1024, description="first layers, dense; the next one selects")] = 2
    reselect_layers: Annotated[
        tuple[Annotated[int, Field(strict=True)], ...],
        Field(description="layers that select again; empty scales the paper's 13", strict=False),
    ] = ()
    sink_tokens: Annotated[int, Field(ge=0, le=65536, description="first tokens, always read")] = 16
    recent_tokens: Annotated[int, Field(ge=0, le=65536, description="last tokens, always read")] = 64
    lists: Annotated[Literal["kv_head", "query_head"], Field(description="heads that share a list")] = "kv_head"

    def __post_init__(self) -> None:
        # Equal sets of layers are equal settings, which share cached blocks.
        object.__setattr__(self, "reselect_layers", tuple(sorted(set(self.reselect_layers))))
        if self.sink_tokens + self.recent_tokens > self.budget:
            raise KnobError(
                "budget",
                self.budget,
                f"{self.budget} tokens do not hold sink_tokens {self.sink_tokens} and recent_tokens "
                f"{self.recent_tokens}; raise it or lower them",
            )

    @property
    def budget_tokens(self) -> int:
        return self.budget

    def layer_roles(self, num_layers: int) -> list[str]:
        first = self.full_layers
        if first >= num_layers:
            raise KnobError(
                "full_layers", first, f"this model has {num_layers} layers, so 0 to {num_layers - 1} are allowed"
            )
        for layer in self.reselect_layers:
            if not first < layer < num_layers:
                raise KnobError(
                    "reselect_layers",
                    list(self.reselect_layers),
                    f"this model has {num_layers} layers and selects first in layer {first}, so layers {first + 1} to "
                    f"{num_layers - 1} are allowed",
                )
        again = self.reselect_layers or (round(PAPER_RESELECT_LAYER * num_layers / PAPER_LAYERS),)
        return [
            "dense" if layer < first else "select" if layer == first or layer in again else "reuse"
            for layer in range(num_layers)
        ]

    def select(
        self, query: torch.Tensor, keys: PagedKeys, scale: float, page_size_tokens: int, memory: LayerMemory
    ) -> PageList:
        context = keys.context_tokens
        scores = token_scores(query, keys, scale, merge_heads=self.lists == "kv_head")
        if page_size_tokens > 1:
            # Coarser pages: a page is worth its best token.
            padding = -context % page_size_tokens
            scores = torch.nn.functional.pad(scores, (0, padding), value=float("-inf"))
            scores = scores.view(scores.shape[0], -1, page_size_tokens).amax(2)
        return top_pages(
            scores, context, page_size_tokens, page_size_tokens, self.budget, self.sink_tokens, self.recent_tokens
        )
