"""Token top-k decode: in each layer the single tokens with the most attention, by 2-bit codes of their keys."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass

from vllm_sparse.kernels.code_scores import code_scores
from vllm_sparse.kernels.page_summaries import SummaryKind
from vllm_sparse.kernels.top_coded_tokens import top_coded_tokens
from vllm_sparse.kernels.top_tokens import TokenBudget, best_of_pages, top_pages
from vllm_sparse.keys import PagedKeys
from vllm_sparse.methods.decode import LayerMemory, TopTokensMethod, choosing_in_each_layer
from vllm_sparse.methods.knobs import KNOBS, BudgetTokens, DenseLayers, KnobError, RecentTokens, SinkTokens
from vllm_sparse.pages import PageList
from vllm_sparse.step.roles import Role
from vllm_sparse.step.rows import DecodeRows, RowsPlace, TokenLists


@dataclass(frozen=True, config=KNOBS)
class TokenTopk(TopTokensMethod):
    """In each layer, read the `budget_tokens` tokens with the most attention, found by 2-bit codes of their keys.

    Beside the KV cache every key is kept in 2 bits a number: in steps of its channel, from the least to the largest
    number of its page of `page_tokens` (as KIVI, arXiv 2402.02750, quantises keys; this project's use of it). A step
    scores all codes of the context, an eighth of the bytes of the keys, and reads the keys and values of the best
    tokens exactly. Codes rank single tokens, which bounds and means of pages cannot (docs/methods.md).

    Lists are per KV head, with the query heads of a group merged by the maximum of their attention probabilities. Sink
    and recent tokens are forced into every list, and so are those of the last page while it is not full. Where the
    executor's pages are coarser than a token, a page is worth its best token.

    Codes take 1/16 of the KV cache, and their pages' steps ``1 / page_tokens`` of it with 16-bit numbers, so
    `page_tokens` is the server's choice. On a GPU choosing is fastest where a page is a block of the cache, 128 tokens.
    """

    name: ClassVar[str] = "tokentopk"
    # Its codes take memory beside the KV cache.
    enabled_by_default: ClassVar[bool] = False
    server_knobs: ClassVar[tuple[str, ...]] = ("page_tokens",)
    scores_tokens: ClassVar[bool] = True

    budget_tokens: BudgetTokens = 2048
    sink_tokens: SinkTokens = 16
    recent_tokens: RecentTokens = 64
    dense_layers: DenseLayers = 0
    reuse_layers: Annotated[
        tuple[Annotated[int, Field(strict=True)], ...],
        Field(description="layers that read the list of the layer before them and choose none", strict=False),
    ] = ()
    page_tokens: Annotated[Literal[16, 32, 64, 128], Field(description="tokens that share a channel's steps")] = 32

    def __post_init__(self) -> None:
        # Equal sets of layers are equal settings, which share cached blocks.
        object.__setattr__(self, "reuse_layers", tuple(sorted(set(self.reuse_layers))))
        self.check_budget()

    @property
    def summaries(self) -> SummaryKind:
        return SummaryKind(self.page_tokens, "codes")

    @property
    def weighs_masses(self) -> bool:
        return True

    def layer_roles(self, num_layers: int) -> list[Role]:
        roles = choosing_in_each_layer(self.dense_layers, num_layers)
        first = self.dense_layers + 1
        for layer in self.reuse_layers:
            if not first <= layer < num_layers:
                raise KnobError(
                    "reuse_layers",
                    list(self.reuse_layers),
                    f"this model has {num_layers} layers and chooses first in layer {first - 1}, so layers {first} to "
                    f"{num_layers - 1} are allowed",
                )
            roles[layer] = Role.READ
        return roles

    def select(
        self, query: torch.Tensor, keys: PagedKeys, scale: float, page_size_tokens: int, memory: LayerMemory
    ) -> PageList:
        scores = code_scores(query, keys, self.summaries, scale)
        recent = max(self.recent_tokens, keys.seq_len % self.page_tokens)
        budget = TokenBudget(self.budget_tokens, self.sink_tokens, recent)
        page = page_size_tokens
        return top_pages(best_of_pages(scores, page), keys.seq_len, page, page, budget)

    def choose_rows(self, rows: DecodeRows, knobs: torch.Tensor, place: RowsPlace, lists: TokenLists) -> None:
        top_coded_tokens(rows, knobs, self.summaries, place, lists)
