"""The contract of prefill methods: for each query block of a prompt chunk, the pages that it may read."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from vllm_sparse.kernels.page_list import ListGrid, block_lists
from vllm_sparse.methods.method import Method

if TYPE_CHECKING:
    import torch

    from vllm_sparse.keys import PagedKeys
    from vllm_sparse.pages import PageList


@dataclass(frozen=True)
class Layer:
    """Where in the model, and in which prompt, a prefill selection happens.

    Attributes:
        index: of the attention layer.
        first_query_head: the model's number of this process's first query head; not 0 under tensor parallelism.
        prompt_tokens: of the whole prompt, of which the prompt chunk may be a part, or which it may reach beyond where
            outputs are computed again after a preemption; None if the chunk's end is the prompt's, or that is unknown.
    """

    index: int
    first_query_head: int
    prompt_tokens: int | None = None


class PrefillMethod(Method):
    """Chooses the pages that each query block of a prompt chunk may read."""

    page_tokens: ClassVar[int]
    """Granularity of the choice, a power of two; the executor's pages are at most this, where it can."""
    dense_layers: int
    """Number of first layers that stay dense."""
    query_block_tokens: int
    """Query tokens that share one list."""
    list_per: str
    """Heads that share one list: ``query_head`` or ``kv_head``."""

    @property
    @abstractmethod
    def exactly_dense(self) -> bool:
        """These knobs select everything, for every prompt."""

    @property
    def min_query_tokens(self) -> int:
        """Shorter prompt chunks run dense: choosing would cost as much as the chunk."""
        return 2 * self.query_block_tokens

    def list_heads(self, query_heads: int, kv_heads: int) -> int:
        """Number of heads that have lists of their own."""
        return kv_heads if self.list_per == "kv_head" else query_heads

    @abstractmethod
    def block_mask(self, query: torch.Tensor, keys: PagedKeys, scale: float, layer: Layer) -> torch.Tensor:
        """Choose blocks of `page_tokens` keys for one request's prompt chunk; arguments as in `select`.

        Returns:
            bool ``[heads, ceil(chunk / query_block_tokens), ceil(context / page_tokens)]`` on a key grid from token 0.
            There may be more heads than lists, which are then merged, or fewer, which then share; blocks of the future
            do not matter.
        """

    def select(
        self, query: torch.Tensor, keys: PagedKeys, scale: float, page_size_tokens: int, layer: Layer
    ) -> PageList:
        """Choose pages for one request's prompt chunk.

        Args:
            query: ``[chunk, query_heads, head_size]``, at the last positions of the context.
            keys: the request's keys, the chunk's included.
            scale: the model's softmax scale.
            page_size_tokens: page size of the executor.
            layer: where.

        Returns:
            Lists of ``heads * ceil(chunk / query_block_tokens)`` rows, head-major, with `heads` as `list_per` says.
        """
        chunk, query_heads, _ = query.shape
        having = self.list_heads(query_heads, keys.num_kv_heads)
        mask = self.block_mask(query, keys, scale, layer)
        if mask.shape[0] < having:
            mask = mask.repeat_interleave(having // mask.shape[0], dim=0)
        grid = ListGrid(chunk, keys.seq_len, self.query_block_tokens, self.page_tokens, page_size_tokens, having)
        return block_lists(mask, grid)
