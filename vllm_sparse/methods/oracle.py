"""The best lists of a given length, by the exact attention: an upper bound of what choosing can reach."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic.dataclasses import dataclass

from vllm_sparse.kernels.block_mass import block_mass
from vllm_sparse.kernels.token_scores import token_scores
from vllm_sparse.kernels.top_tokens import TokenBudget, top_pages, top_tokens
from vllm_sparse.keys import PagedKeys
from vllm_sparse.methods.baseline import DecodeBaseline, PrefillBaseline
from vllm_sparse.methods.decode import LayerMemory
from vllm_sparse.methods.knobs import KNOBS
from vllm_sparse.methods.prefill import Layer
from vllm_sparse.pages import PageList
from vllm_sparse.step.rows import DecodeRows, RowsPlace, TokenLists


@dataclass(frozen=True, config=KNOBS)
class Oracle(PrefillBaseline):
    """Read the pages that hold most of the exact attention of a query block, up to `density` of what it can reach.

    A baseline that costs more than dense attention. No list of the same length for the same query block and head keeps
    more attention, but for what sink and recent tokens take.
    """

    name: ClassVar[str] = "oracle"

    @property
    def weighs_masses(self) -> bool:
        return True

    def page_scores(self, query: torch.Tensor, keys: PagedKeys, scale: float, layer: Layer) -> torch.Tensor:
        """Exact attention mass."""
        return block_mass(query, keys, scale, self.query_block_tokens, PrefillBaseline.page_tokens)


@dataclass(frozen=True, config=KNOBS)
class OracleDecode(DecodeBaseline):
    """Read the tokens that have most of the exact attention, per KV head and layer.

    A baseline that reads all keys in each layer. The query heads of a KV head are merged by the sum of their attention
    probabilities, so no list of the same length per KV head keeps more attention, but for what sink and recent tokens
    take. Where the executor's pages are coarser, they are chosen by the sum over their tokens.
    """

    name: ClassVar[str] = "oracle"
    scores_tokens: ClassVar[bool] = True

    @property
    def weighs_masses(self) -> bool:
        return True

    def select(
        self, query: torch.Tensor, keys: PagedKeys, scale: float, page_size_tokens: int, memory: LayerMemory
    ) -> PageList:
        context, page = keys.seq_len, page_size_tokens
        logarithms = token_scores(query, keys, scale, merge_heads=False)
        padded = torch.nn.functional.pad(logarithms, (0, -context % page), value=float("-inf"))
        # Logarithms of sums, because small probabilities would all become 0 and lose their order.
        scores = padded.view(keys.num_kv_heads, -1, padded.shape[1] // page, page).logsumexp(dim=(1, 3))
        budget = TokenBudget(self.budget_tokens, self.sink_tokens, self.recent_tokens)
        return top_pages(scores, context, page, page, budget)

    def choose_rows(self, rows: DecodeRows, knobs: torch.Tensor, place: RowsPlace, lists: TokenLists) -> None:
        # Imported here: there is Triton only where there is a GPU.
        from vllm_sparse.kernels.token_scores.triton import token_scores_of_rows

        scores = token_scores_of_rows(rows, place.starts, place.capacity_tokens, sum_heads=True)
        top_tokens(scores, rows, knobs, lists)
