"""What a sparse method is: one file, one frozen dataclass of knobs, one `select`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

from pydantic import ConfigDict

if TYPE_CHECKING:
    import torch

    from vllm_sparse.keys import PagedKeys
    from vllm_sparse.pages import PageList

# Knobs are checked strictly: a string is no number, a typo is no knob.
KNOBS = ConfigDict(extra="forbid", strict=True)


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


class PrefillMethod(ABC):
    """Chooses the pages that each query block of a prefill chunk may read."""

    name: ClassVar[str]
    query_block_tokens: ClassVar[int]
    """Query tokens that share one list."""
    dense_layers: int
    """The first layers, left dense."""

    @property
    @abstractmethod
    def exactly_dense(self) -> bool:
        """These knobs select everything, for every prompt."""

    @property
    def min_query_tokens(self) -> int:
        """Shorter chunks run dense: the sample would cost as much as the chunk."""
        return 2 * self.query_block_tokens

    @abstractmethod
    def select(self, query: torch.Tensor, keys: PagedKeys, scale: float, page_size_tokens: int) -> PageList:
        """Choose pages for one request's chunk.

        Args:
            query: ``[chunk, query_heads, head_size]``, at the last positions of the context.
            keys: the request's keys, the chunk's included.
            scale: the model's softmax scale.
            page_size_tokens: page size of the executor.

        Returns:
            Lists of ``query_heads * ceil(chunk / query_block_tokens)`` rows, head-major.
        """


class DecodeMethod(ABC):
    """Chooses the pages that a decode step may read, in some layers, for use in those that follow."""

    name: ClassVar[str]

    @property
    @abstractmethod
    def budget_tokens(self) -> int:
        """Tokens read by a sparse layer; a request with no more context than this runs dense."""

    @abstractmethod
    def layer_roles(self, num_layers: int) -> list[str]:
        """Role of each layer: ``dense``, ``select`` (dense, and chooses a list) or ``reuse`` (reads the list).

        Raises:
            KnobError: a knob names a layer that the model does not have.
        """

    @abstractmethod
    def select(self, query: torch.Tensor, keys: PagedKeys, scale: float, page_size_tokens: int) -> PageList:
        """Choose pages for one request's newest token.

        Args:
            query: ``[query_heads, head_size]``.
            keys: the request's keys, the newest token's included.
            scale: the model's softmax scale.
            page_size_tokens: page size of the executor.

        Returns:
            Lists of one row per KV head, or one row per query head.
        """
