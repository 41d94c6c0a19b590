"""HiP (arXiv 2406.09827) as InfiniteHiP (arXiv 2502.08910) decodes: stages of a search, renewed every few steps."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from pydantic.dataclasses import dataclass

from vllm_sparse.kernels.hierarchical_descent import LEAF_TOKENS, Stage
from vllm_sparse.kernels.hierarchical_descent.reference import search_start
from vllm_sparse.kernels.hip_decode import (
    DecodeSearch,
    HipMemory,
    RowMemory,
    StageMemory,
    StageScratch,
    decode_leaves,
    token_lists,
)
from vllm_sparse.kernels.page_list import ListGrid, block_lists
from vllm_sparse.keys import PagedKeys
from vllm_sparse.methods.decode import BatchDecodeMethod, DecodeMethod, LayerMemory
from vllm_sparse.methods.hip.stages import (
    DEFAULT_STAGE_BLOCK_TOKENS,
    DEFAULT_STAGE_BUDGET_TOKENS,
    Integers,
    StageBlockTokens,
    StageBudgetTokens,
    check_not_rising,
    check_one_each,
    check_stages,
)
from vllm_sparse.methods.knobs import KNOBS, LIMITED_BUDGET, DenseLayers, KnobError, SinkTokens
from vllm_sparse.pages import PageList
from vllm_sparse.step.roles import Role
from vllm_sparse.step.rows import DecodeRows, RowsPlace, ServerSize, TokenLists

# What the knobs of a row have room for (`backend.decode.MOST_KNOBS`).
MOST_STAGES = 4
FIRST_REFRESH, LONGEST_REFRESH = 16, 1024


@dataclass(frozen=True, config=KNOBS)
class HipDecode(BatchDecodeMethod):
    """Search the keys in stages as `Hip` does for a prompt, for the newest token alone, and keep what stages found.

    Stage ``i`` is searched anew where the context is a multiple of ``refresh_steps[i]``, and all later stages with it;
    all stages are where the memory is not of the step before, as at a request's first. So requests take turns, and none
    depends on its neighbours. In between, kept leaves stay and new tokens join the window, whose start waits for the
    first stage: no token is out of the window before a search may choose it.

    The last stage scores a key block by the attention to all of its keys, which no paper does; the papers' descents
    (`last_stage` ``representatives``) miss keys whose neighbours score less.

    A list is per KV head, whose query heads share scores: in descents by their maximum, else by the sum of their
    probabilities; so tensor parallelism changes nothing.
    """

    name: ClassVar[str] = "hip"
    shares_lists: ClassVar[bool] = False
    former_names: ClassVar[dict[str, str]] = {
        "stage_chunks": "stage_block_tokens",
        "stage_tokens": "stage_budget_tokens",
        "sink": "sink_tokens",
        "window": "recent_tokens",
        "refresh": "refresh_steps",
    }

    stage_block_tokens: StageBlockTokens = DEFAULT_STAGE_BLOCK_TOKENS
    stage_budget_tokens: StageBudgetTokens = DEFAULT_STAGE_BUDGET_TOKENS
    refresh_steps: Annotated[
        Integers,
        Field(
            description=f"decode steps between two searches of each stage, not rising, at most {LONGEST_REFRESH}; "
            f"empty: {FIRST_REFRESH}, halved from stage to stage",
            strict=False,
        ),
    ] = ()
    sink_tokens: SinkTokens = 256
    recent_tokens: Annotated[
        int, Field(ge=0, le=1 << 16, description="tokens before the newest, always read"), LIMITED_BUDGET
    ] = 1024
    dense_layers: DenseLayers = 0
    last_stage: Annotated[
        Literal["all_keys", "representatives"],
        Field(
            description="what the last stage scores a key block by: the attention to all of its keys, or single keys "
            "that a descent finds, as in the paper"
        ),
    ] = "all_keys"

    def __post_init__(self) -> None:
        check_stages(self.stage_block_tokens, self.stage_budget_tokens)
        stages = len(self.stage_block_tokens)
        if stages > MOST_STAGES:
            raise KnobError(
                "stage_block_tokens",
                list(self.stage_block_tokens),
                f"at most {MOST_STAGES} stages are allowed in decoding",
            )
        if not self.refresh_steps:
            object.__setattr__(self, "refresh_steps", tuple(FIRST_REFRESH >> stage for stage in range(stages)))
        check_one_each("refresh_steps", self.refresh_steps, self.stage_block_tokens)
        if not all(1 <= steps <= LONGEST_REFRESH for steps in self.refresh_steps):
            raise KnobError("refresh_steps", list(self.refresh_steps), f"1 to {LONGEST_REFRESH} steps are allowed")
        check_not_rising("refresh_steps", self.refresh_steps)

    @property
    def budget_tokens(self) -> int:
        """The longest list: with sink and window rounded to leaves, and what joins the window between searches."""
        window = self.recent_tokens + self.refresh_steps[0] + LEAF_TOKENS - 1
        return search_start(self.sink_tokens) + self.stage_budget_tokens[-1] + window

    @classmethod
    def with_budget(cls, budget_tokens: int) -> HipDecode:
        return cls(
            stage_budget_tokens=tuple(budget_tokens // 32 * 16 * more for more in (16, 4, 1)),
            sink_tokens=budget_tokens // 8,
            recent_tokens=budget_tokens // 4,
        )

    @property
    def weighs_masses(self) -> bool:
        return self.last_stage == "all_keys"

    def layer_roles(self, num_layers: int) -> list[Role]:
        dense = min(self.dense_layers, num_layers)
        return [Role.DENSE] * dense + [Role.WRITE_AND_READ] * (num_layers - dense)

    def first_due(self, seq_len: int) -> int:
        """The first stage that is searched anew at a step, with all later ones; the number of stages if none is."""
        due = (stage for stage, steps in enumerate(self.refresh_steps) if seq_len % steps == 0)
        return next(due, len(self.refresh_steps))

    def list_tokens(self, seq_lens: np.ndarray) -> np.ndarray:
        """Where the last stage keeps as much as it may, and no chunk is cut by the end of the search range."""
        begin = search_start(self.sink_tokens)
        # As `search_end`, which is not negative, nor the window's start before `begin`.
        end = seq_lens - seq_lens % self.refresh_steps[0] - (1 + self.recent_tokens)
        window_start = np.maximum(end // LEAF_TOKENS * LEAF_TOKENS, begin)
        kept: np.ndarray = seq_lens - window_start + (begin + self.stage_budget_tokens[-1])
        return kept

    @property
    def longest_list_tokens(self) -> int:
        return self.budget_tokens

    def row_knobs(self) -> tuple[int, ...]:
        stages = reversed(list(zip(self.stage_block_tokens, self.stage_budget_tokens, self.refresh_steps, strict=True)))
        all_keys = int(self.last_stage == "all_keys")
        return self.sink_tokens, self.recent_tokens, all_keys, *(knob for stage in stages for knob in stage)

    def serves(self, method: DecodeMethod, max_seq_len: int) -> bool:
        if not isinstance(method, HipDecode) or len(method.stage_block_tokens) > len(self.stage_block_tokens):
            return False
        needed, allocated = (one.device_sizes(max_seq_len) for one in (method, self))
        return all(need <= has for need, has in zip(needed, allocated, strict=True))

    def allocate(self, size: ServerSize, device: torch.device) -> HipMemory:
        stages = len(self.stage_block_tokens)
        most_kept, most_candidates = self.device_sizes(size.max_seq_len)
        return HipMemory(
            {
                layer: StageMemory.allocate(stages, size.requests, size.kv_heads, most_kept, device)
                for layer in size.layers
            },
            StageScratch.allocate(size.requests, size.kv_heads, most_candidates, device),
        )

    def choose_rows(self, rows: DecodeRows, knobs: torch.Tensor, place: RowsPlace, lists: TokenLists) -> None:
        memory = place.memory
        assert isinstance(memory, HipMemory)
        row_memory = RowMemory(place.slots, place.fresh, memory.layers[place.layer], memory.scratch)
        token_lists(rows, knobs, row_memory, lists)

    def device_sizes(self, max_seq_len: int) -> tuple[int, int]:
        """Most chunks that a stage keeps and that one chooses from, for contexts of up to so many tokens."""
        most_kept = most_candidates = 0
        left = max_seq_len
        for length, tokens in zip(self.stage_block_tokens, self.stage_budget_tokens, strict=True):
            candidates = -(-left // length)
            most_candidates = max(most_candidates, candidates)
            most_kept = max(most_kept, min(candidates, tokens // length))
            left = min(left, tokens)
        return most_kept, most_candidates

    def search(self, scale: float) -> DecodeSearch:
        """What a step searches and what it always keeps, for a model with this softmax scale."""
        stages = zip(self.stage_block_tokens, self.stage_budget_tokens, strict=True)
        return DecodeSearch(
            [Stage(length, tokens) for length, tokens in stages],
            self.sink_tokens,
            self.recent_tokens,
            self.refresh_steps[0],
            scale if self.last_stage == "all_keys" else None,
        )

    def select(
        self, query: torch.Tensor, keys: PagedKeys, scale: float, page_size_tokens: int, memory: LayerMemory
    ) -> PageList:
        context = keys.seq_len
        standing = self.first_due(context) if memory.seq_len == context - 1 else 0
        memory.stages, leaves = decode_leaves(query, keys, memory.stages[:standing], self.search(scale))
        memory.seq_len = context
        grid = ListGrid(1, context, 1, LEAF_TOKENS, page_size_tokens, keys.num_kv_heads)
        return block_lists(leaves.unsqueeze(1), grid)
