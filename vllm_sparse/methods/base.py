"""What a sparse method is: one file, one frozen dataclass of knobs, one choice."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import numpy as np
from pydantic import ConfigDict, Field

from vllm_sparse.kernels.page_list import chunk_lists

if TYPE_CHECKING:
    import torch

    from vllm_sparse.kernels.page_summaries import SummaryKind
    from vllm_sparse.keys import PagedKeys
    from vllm_sparse.pages import PageList
    from vllm_sparse.step.roles import Role
    from vllm_sparse.step.rows import DecodeMemory, DecodeRows, RowsPlace, ServerSize, TokenLists

# Knobs are checked strictly: a string is no number, a typo is no knob.
KNOBS = ConfigDict(extra="forbid", strict=True)

# Knobs that all prefill methods have; their defaults are the method's own.
DenseLayers = Annotated[int, Field(ge=0, le=1024, description="first layers, left dense")]
QueryBlock = Annotated[Literal[64, 128], Field(description="query tokens that share a list")]
Rows = Annotated[
    Literal["query_head", "kv_head"],
    Field(description="heads that share a list; kv_head reads what any query head of its group chose"),
]
# Knobs that methods with a budget have.
SinkTokens = Annotated[int, Field(ge=0, le=1 << 16, description="first tokens, always read")]
DenseTail = Annotated[
    int, Field(ge=0, le=1 << 16, description="last queries of each chunk, whose query blocks read everything")
]
ScoreHeads = Annotated[
    Literal["query_head", "kv_head", "layer"],
    Field(description="heads that share scores: none, a KV head's query heads, all"),
]


def heads_with_scores(heads: str, query_heads: int, kv_heads: int) -> int:
    """Heads that have scores of their own, as the knob `ScoreHeads` says."""
    return {"query_head": query_heads, "kv_head": kv_heads, "layer": 1}[heads]


@dataclass(frozen=True)
class Layer:
    """Where in the model a selection happens.

    Attributes:
        index: of the attention layer.
        first_query_head: the model's number of this process's first query head; not 0 under tensor parallelism.
    """

    index: int
    first_query_head: int


class KnobError(ValueError):
    """A knob's value does not go with the model or with another knob.

    Attributes:
        knob: its name.
        value: its value.
    """

    def __init__(self, knob: str, value: object, message: str) -> None:
        super().__init__(message)
        self.knob = knob
        self.value = value


class Method(ABC):
    """What methods of both phases are: a name, and knobs of a server and of its requests."""

    name: ClassVar[str]
    server_knobs: ClassVar[tuple[str, ...]] = ()
    """Knobs that the server's configuration may set and a request may not."""

    @property
    def fingerprint(self) -> str:
        """What the choice depends on beside the knobs, such as a file's content; cached blocks are kept apart by it."""
        return ""

    def check_defaults(self, num_layers: int, num_query_heads: int) -> None:  # noqa: B027
        """Check knobs as the server's configuration sets them: against the model and against one another.

        Args:
            num_layers: attention layers of the model.
            num_query_heads: query heads of the whole model.

        Raises:
            KnobError: a knob does not go with the model, or would never count.
        """


class PrefillMethod(Method):
    """Chooses the pages that each query block of a prefill chunk may read."""

    page_tokens: ClassVar[int]
    """Granularity of the choice, a power of two; the executor's pages are at most this, where it can."""
    dense_layers: int
    """The first layers, left dense."""
    query_block: int
    """Query tokens that share one list."""
    rows: str
    """Heads that share one list: ``query_head`` or ``kv_head``."""

    @property
    @abstractmethod
    def exactly_dense(self) -> bool:
        """These knobs select everything, for every prompt."""

    @property
    def min_query_tokens(self) -> int:
        """Shorter chunks run dense: the sample would cost as much as the chunk."""
        return 2 * self.query_block

    def list_heads(self, query_heads: int, kv_heads: int) -> int:
        """Heads that have lists of their own."""
        return kv_heads if self.rows == "kv_head" else query_heads

    @abstractmethod
    def block_mask(self, query: torch.Tensor, keys: PagedKeys, scale: float, layer: Layer) -> torch.Tensor:
        """Choose blocks of `page_tokens` keys for one request's chunk; arguments as in `select`.

        Returns:
            bool ``[heads, ceil(chunk / query_block), ceil(context / page_tokens)]`` on a key grid from token 0. There
            may be more heads than lists, which are then merged, or fewer, which then share; blocks of the future do
            not matter.
        """

    def select(
        self, query: torch.Tensor, keys: PagedKeys, scale: float, page_size_tokens: int, layer: Layer
    ) -> PageList:
        """Choose pages for one request's chunk.

        Args:
            query: ``[chunk, query_heads, head_size]``, at the last positions of the context.
            keys: the request's keys, the chunk's included.
            scale: the model's softmax scale.
            page_size_tokens: page size of the executor.
            layer: where.

        Returns:
            Lists of ``heads * ceil(chunk / query_block)`` rows, head-major, with `heads` as `rows` says.
        """
        chunk, query_heads, _ = query.shape
        having = self.list_heads(query_heads, keys.num_kv_heads)
        mask = self.block_mask(query, keys, scale, layer)
        if mask.shape[0] < having:
            mask = mask.repeat_interleave(having // mask.shape[0], dim=0)
        return chunk_lists(
            mask, self.page_tokens, chunk, keys.context_tokens, self.query_block, page_size_tokens, having
        )


@dataclass
class LayerMemory:
    """What a decode method keeps of one request in one layer from step to step; empty at the request's first step.

    Attributes:
        stages: results of a search's stages, earlier ones first.
        context_tokens: context at the step that used it last.
    """

    stages: list[torch.Tensor] = field(default_factory=list)
    context_tokens: int = 0


class DecodeMethod(Method):
    """Chooses the pages that a decode step may read, in some layers, for the same layer or for those that follow."""

    @property
    @abstractmethod
    def budget_tokens(self) -> int:
        """Tokens read by a sparse layer; a request with no more context than this runs dense."""

    @property
    def summaries(self) -> SummaryKind | None:
        """What is kept of each page's keys in the layers that choose, from a request's first token on; None: nothing.

        The knobs that it depends on are the server's.
        """
        return None

    @abstractmethod
    def layer_roles(self, num_layers: int) -> list[Role]:
        """Role of each layer: what a row reads there, and whether it writes a list.

        Raises:
            KnobError: a knob names a layer that the model does not have.
        """

    @abstractmethod
    def select(
        self, query: torch.Tensor, keys: PagedKeys, scale: float, page_size_tokens: int, memory: LayerMemory
    ) -> PageList:
        """Choose pages for one request's newest token.

        Args:
            query: ``[query_heads, head_size]``.
            keys: the request's keys, the newest token's included.
            scale: the model's softmax scale.
            page_size_tokens: page size of the executor.
            memory: of this request in this layer, updated.

        Returns:
            Lists of one row per KV head, or one row per query head.
        """


class BatchDecodeMethod(DecodeMethod):
    """A decode method that can choose for all rows of a step at once, on a GPU."""

    scores_tokens: ClassVar[bool] = False
    """`choose_rows` scores whole contexts and needs room for that."""

    def serves(self, method: DecodeMethod, most_context_tokens: int) -> bool:
        """Whether `choose_rows` serves a request; otherwise it is served one by one, on a GPU too.

        Args:
            method: the request's, or this one itself: a server whose own is not served keeps nothing for it.
            most_context_tokens: of the longest request, for which `allocate` has made room.
        """
        return type(method) is type(self)

    def allocate(self, size: ServerSize, device: torch.device) -> DecodeMemory | None:
        """What `choose_rows` keeps from step to step of all requests that it serves; None: nothing."""
        return None

    @abstractmethod
    def list_tokens(self, context_tokens: np.ndarray) -> np.ndarray:
        """Tokens in lists of single tokens, at most, for contexts longer than `budget_tokens`; int64 of any shape."""

    @property
    @abstractmethod
    def longest_list_tokens(self) -> int:
        """Tokens in the longest list that `list_tokens` gives for any context."""

    @abstractmethod
    def row_knobs(self) -> tuple[int, ...]:
        """What `choose_rows` needs of a row's knobs."""

    @abstractmethod
    def choose_rows(self, rows: DecodeRows, knobs: torch.Tensor, place: RowsPlace, lists: TokenLists) -> None:
        """Choose tokens for all rows of a step in one layer, on a GPU, as `select` does for one with pages of a token.

        Called of the method as the server's configuration sets it; a row's own knobs are in `knobs`. May be captured
        in a CUDA graph: no more is known to the host than shapes.

        Args:
            rows: the rows; those with a context of 0 keep their lists.
            knobs: int32 ``[rows, knobs]`` as of `row_knobs`; a row's lie side by side.
            place: what there is room for, and what is kept.
            lists: written.
        """


class TopTokensMethod(BatchDecodeMethod):
    """A decode method that scores a whole context and reads its best units beside the first and the last tokens.

    As `kernels.top_tokens.top_pages` chooses them.
    """

    budget: int
    """Tokens read, the forced ones included."""
    sink_tokens: int
    """First tokens, always read."""
    recent_tokens: int
    """Last tokens, always read; the newest is even where this is 0."""

    @property
    def unit_tokens(self) -> int:
        """Tokens that are kept or dropped together."""
        return 1

    def check_budget(self) -> None:
        """Check that the budget holds what is forced.

        Raises:
            KnobError: it does not.
        """
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

    def list_tokens(self, context_tokens: np.ndarray) -> np.ndarray:
        unit = self.unit_tokens
        sink_tokens, budget = (-(-tokens // unit) * unit for tokens in (self.sink_tokens, self.budget))
        # Whole units that are left out: of all but the budget, at most those between what is forced.
        left_out = (context_tokens + (unit - 1 - budget)) // unit
        between = (context_tokens - (max(self.recent_tokens, 1) + sink_tokens)) // unit
        kept: np.ndarray = context_tokens - np.maximum(np.minimum(left_out, between), 0) * unit
        return kept

    @property
    def longest_list_tokens(self) -> int:
        unit = self.unit_tokens
        # The last tokens are most where the first of them ends a unit.
        forced_tokens = -(-self.sink_tokens // unit) * unit + max(self.recent_tokens, 1) + unit - 1
        return max(-(-self.budget // unit) * unit, forced_tokens)

    def row_knobs(self) -> tuple[int, ...]:
        return self.budget, self.sink_tokens, self.recent_tokens
