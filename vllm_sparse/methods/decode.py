"""The contracts of decode methods: for the newest token of a request, the tokens that it may read."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from pydantic import dataclasses as checked

from vllm_sparse.methods.knobs import KNOBS, DenseEverySteps, KnobError
from vllm_sparse.methods.method import Method
from vllm_sparse.step.roles import Role

if TYPE_CHECKING:
    import torch

    from vllm_sparse.kernels.page_summaries import SummaryKind
    from vllm_sparse.keys import PagedKeys
    from vllm_sparse.pages import PageList
    from vllm_sparse.step.rows import DecodeMemory, DecodeRows, RowsPlace, ServerSize, TokenLists


@dataclass
class LayerMemory:
    """What a decode method keeps of one request in one layer from step to step; no stages at its first step.

    Attributes:
        stages: results of a search's stages, earlier ones first.
        seq_len: context at the step that used it last.
        layer: index of the attention layer.
    """

    stages: list[torch.Tensor] = field(default_factory=list)
    seq_len: int = 0
    layer: int = 0


@checked.dataclass(frozen=True, config=KNOBS, kw_only=True)
class DecodeMethod(Method):
    """Chooses the pages that a decode step may read, in some layers, for the same layer or for those that follow.

    Keys and values of a decoded token come from hidden states that lists made approximate, and stay in the cache. With
    `dense_every_steps` every n-th step attends to everything, so that its token's come from no list of its own, but
    from the cache as it is. TidalDecode (arXiv 2410.05076) goes further, which is not done here: it prefills the tokens
    since the last correction anew.
    """

    dense_every_steps: DenseEverySteps = 0

    def is_dense_step(self, seq_len: int) -> bool:
        """Whether a decode step reads everything in all layers because of `dense_every_steps`.

        Told by the position alone, so that neighbours, preemption and prefix hits change nothing.

        Args:
            seq_len: tokens in the request's cache, the newest included.
        """
        return self.dense_every_steps > 0 and seq_len % self.dense_every_steps == 0

    @property
    @abstractmethod
    def budget_tokens(self) -> int:
        """Tokens read by a sparse layer; a request with no more context than this runs dense."""

    @classmethod
    def with_budget(cls, budget_tokens: int) -> DecodeMethod:
        """The method with a budget of so many tokens, or a little less, for comparisons at equal budgets."""
        method: Any = cls
        built: DecodeMethod = method(budget_tokens=budget_tokens)
        return built

    @property
    def summaries(self) -> SummaryKind | None:
        """What is kept of each page's keys in the layers that choose, from a request's first token on; None: nothing.

        The knobs that it depends on are the server's.
        """
        return None

    @property
    def candidate_tokens(self) -> int:
        """Tokens whose keys a choice reads beside the scores of the whole context, to choose among them; 0: none."""
        return 0

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
    shares_lists: ClassVar[bool] = True
    """With some knobs a layer reads a list that another one wrote; where not, graphs of any roles launch less."""

    def serves(self, method: DecodeMethod, max_seq_len: int) -> bool:
        """Whether `choose_rows` serves a request; otherwise it is served one by one, on a GPU too.

        Args:
            method: the request's, or this one itself: a server whose own is not served keeps nothing for it.
            max_seq_len: of the longest request, for which `allocate` has made room.
        """
        return type(method) is type(self)

    def allocate(self, size: ServerSize, device: torch.device) -> DecodeMemory | None:
        """What `choose_rows` keeps from step to step of all requests that it serves; None: nothing."""
        return None

    @abstractmethod
    def list_tokens(self, seq_lens: np.ndarray) -> np.ndarray:
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

    @property
    @abstractmethod
    def sink_tokens(self) -> int:
        """First tokens, always read."""

    @property
    @abstractmethod
    def recent_tokens(self) -> int:
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
        if self.sink_tokens + max(self.recent_tokens, 1) > self.budget_tokens:
            raise KnobError(
                "budget_tokens",
                self.budget_tokens,
                f"{self.budget_tokens} tokens do not hold sink_tokens {self.sink_tokens} and recent_tokens "
                f"{self.recent_tokens} (the newest token is always read); raise it or lower them",
            )

    def list_tokens(self, seq_lens: np.ndarray) -> np.ndarray:
        unit = self.unit_tokens
        sink_tokens, budget = (-(-tokens // unit) * unit for tokens in (self.sink_tokens, self.budget_tokens))
        # Whole units that are left out: of all but the budget, at most those between what is forced.
        left_out = (seq_lens + (unit - 1 - budget)) // unit
        between = (seq_lens - (max(self.recent_tokens, 1) + sink_tokens)) // unit
        kept: np.ndarray = seq_lens - np.maximum(np.minimum(left_out, between), 0) * unit
        return kept

    @property
    def longest_list_tokens(self) -> int:
        unit = self.unit_tokens
        # The last tokens are most where the first of them ends a unit.
        forced_tokens = -(-self.sink_tokens // unit) * unit + max(self.recent_tokens, 1) + unit - 1
        return max(-(-self.budget_tokens // unit) * unit, forced_tokens)

    def row_knobs(self) -> tuple[int, ...]:
        return self.budget_tokens, self.sink_tokens, self.recent_tokens


def choosing_in_each_layer(dense_layers: int, num_layers: int) -> list[Role]:
    """Roles where each layer after the first `dense_layers` reads a list of its own.

    Raises:
        KnobError: no layer is left that reads one.
    """
    if dense_layers >= num_layers:
        raise KnobError(
            "dense_layers", dense_layers, f"this model has {num_layers} layers, so 0 to {num_layers - 1} are allowed"
        )
    return [Role.DENSE] * dense_layers + [Role.WRITE_AND_READ] * (num_layers - dense_layers)
