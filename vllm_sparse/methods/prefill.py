"""The contract of prefill methods: for each query block of a prompt chunk, the pages that it may read."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from vllm_sparse.kernels.page_list import ListGrid, block_lists, write_lists
from vllm_sparse.methods.method import Method
from vllm_sparse.step.chunks import one_chunk

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Self

    import torch

    from vllm_sparse.keys import PagedKeys
    from vllm_sparse.pages import PageList
    from vllm_sparse.step.chunks import PromptBlocks, PromptChunks


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


# Of the real texts of 8K tokens whose densities methods expect.
MEASURED_REACH_TOKENS = 4096
# Of a page in a list's choice: a mark, a 32-bit score and a 32-bit entry.
PAGE_ENTRY_BYTES = 9


def mean_reach(query_tokens: int, seq_len: int) -> float:
    """Keys in reach of a query of a prompt chunk, mean over the chunk; arguments as of `PrefillMethod.read_tokens`."""
    return seq_len - (query_tokens - 1) / 2


def density_at(reach_tokens: float, measured_density: float, exponent: float) -> float:
    """Density with so many keys in reach: that at `MEASURED_REACH_TOKENS`, falling by a power of the reach."""
    density: float = measured_density * (MEASURED_REACH_TOKENS / reach_tokens) ** exponent
    return density


def tokens_with_dense_tail(kept_tokens: float, tail_tokens: int, query_tokens: int, seq_len: int) -> float:
    """Mean of keys read where the last queries of a prompt chunk read everything in reach.

    Args:
        kept_tokens: that the other queries read, at most.
        tail_tokens: last queries, rounded up to query blocks.
        query_tokens: of the prompt chunk.
        seq_len: tokens in the request's cache, those of the chunk included.
    """
    reach = mean_reach(query_tokens, seq_len)
    tail = min(tail_tokens / query_tokens, 1.0)
    return (1 - tail) * min(kept_tokens, reach) + tail * reach


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

    def most_chunks(self, query_tokens: int) -> int:
        """Sparse prompt chunks that so many queries of a step can be."""
        return max(query_tokens // self.min_query_tokens, 1)

    def forms(self) -> Sequence[PrefillMethod]:
        """Itself, and with such other knobs as any request may set that need other kernels."""
        return (self,)

    @abstractmethod
    def read_tokens(self, query_tokens: int, seq_len: int) -> float:
        """Keys that a query of a prompt chunk reads, mean over the chunk, by which a server decides whether it pays.

        Where it depends on the text, what was found on real texts.

        Args:
            query_tokens: of the prompt chunk.
            seq_len: tokens in the request's cache, those of the chunk included.
        """

    def selection_bytes(self, query_tokens: int, seq_len: int, query_heads: int, kv_heads: int) -> int:
        """Memory that choosing for a prompt chunk takes at the most: marks, scores and list entries of all pages.

        Args:
            query_tokens: of the prompt chunk.
            seq_len: tokens in the request's cache, those of the chunk included.
            query_heads: of this process.
            kv_heads: of this process.
        """
        rows = self.list_heads(query_heads, kv_heads) * -(-query_tokens // self.query_block_tokens)
        return rows * -(-seq_len // self.page_tokens) * PAGE_ENTRY_BYTES

    def selection_work(self, seq_len: int, query_heads: int, kv_heads: int) -> float:
        """What choosing costs with these knobs; only its ratio to that of other knobs of the method means something.

        Args:
            seq_len: tokens in the request's cache, those of the prompt chunk included.
            query_heads: of this process.
            kv_heads: of this process.
        """
        return self.list_heads(query_heads, kv_heads) / self.query_block_tokens

    @classmethod
    def measured(cls) -> Self:
        """With the knobs for which `vllm_sparse.step.gpu_table` has what choosing costs: the defaults, mostly."""
        return cls()

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
        mask = shared(self.block_mask(query, keys, scale, layer), having)
        grid = ListGrid(chunk, keys.seq_len, self.query_block_tokens, self.page_tokens, page_size_tokens, having)
        return block_lists(mask, grid)

    def prepare(self, blocks: PromptBlocks, prompt_tokens: Sequence[int | None]) -> Any:
        """What `select_chunks` needs that no layer changes; asked once a step.

        Args:
            blocks: query blocks of the prompt chunks.
            prompt_tokens: of each chunk's request, as in `Layer`.
        """
        return None

    def select_chunks(self, chunks: PromptChunks, layers: Sequence[Layer], prepared: Any, lists: PageList) -> None:
        """Choose pages for the prompt chunks of several requests, each as `select` would for it alone.

        Here one chunk after another; methods whose kernels take several override it.

        Args:
            chunks: the prompt chunks.
            layers: where, for each chunk.
            prepared: of `prepare`, for these chunks.
            lists: lists of all chunks in the order of `PromptBlocks`, written.
        """
        blocks = chunks.blocks
        having = lists.kept_tokens.shape[0] // blocks.blocks
        for number, (span, keys, layer) in enumerate(zip(blocks.spans, chunks.keys, layers, strict=True)):
            mask = shared(self.block_mask(chunks.query_of(number), keys, chunks.scale, layer), having)
            rows = blocks.lists_of(number, having)
            alone = blocks
            if len(blocks.spans) > 1:
                alone = one_chunk(span.query_tokens, span.seq_len, self.query_block_tokens, mask.device)
            of_chunk = replace(lists, pages=lists.pages[rows], kept_tokens=lists.kept_tokens[rows])
            write_lists(mask, alone, self.page_tokens, having, of_chunk)


def shared(mask: torch.Tensor, list_heads: int) -> torch.Tensor:
    """A map of at least as many heads as have lists of their own."""
    return mask if mask.shape[0] >= list_heads else mask.repeat_interleave(list_heads // mask.shape[0], dim=0)
