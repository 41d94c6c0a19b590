"""TidalDecode (arXiv 2410.05076, ICLR 2025): choose tokens in a few layers, reuse the choice in the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass

from vllm_sparse.kernels.token_scores import token_scores
from vllm_sparse.kernels.top_tokens import TokenBudget, best_of_pages, top_pages, top_tokens
from vllm_sparse.keys import PagedKeys
from vllm_sparse.methods.decode import DecodeMethod, LayerMemory, TopTokensMethod
from vllm_sparse.methods.knobs import KNOBS, BudgetTokens, KnobError, RecentTokens, SinkTokens
from vllm_sparse.methods.tidal.policy import load, shipped
from vllm_sparse.pages import PageList
from vllm_sparse.step.roles import Role
from vllm_sparse.step.rows import DecodeRows, RowsPlace, TokenLists

# The paper's. Choosing one layer earlier loses needles on the 8-layer bundled model.
DENSE_LAYERS = 2
# The paper chooses in layer 2 and once more (13 of 32). On real checkpoints a list that old loses every second needle,
# at every depth of the model: docs/methods.md, "What decoding loses on real checkpoints, and why".
LAYERS_OF_A_LIST = 3


@dataclass(frozen=True, config=KNOBS)
class Tidal(TopTokensMethod):
    """Position-persistent selection: a list is chosen in a full layer, and the layers after it read it.

    Lists are per KV head by default, with the query heads of a group merged by the maximum of their attention
    probabilities; the paper's accuracy code has one per query head. Sink and recent tokens are forced into every
    list, which the paper does not do; 0 switches either off. The newest token is always read.

    A layer that selects has scored all keys. Reading its own list beside that, which the paper does not do, costs it
    half of what reading everything does, and keeps more of its attention than the later layers keep of theirs. On real
    checkpoints it lost nothing (docs/methods.md), so it is the default.

    Which layers choose is told by `dense_layers` and `reselect_layers`, or by a server's `policy`, which does not count
    for a request that sets one of the two.
    """

    name: ClassVar[str] = "tidal"
    scores_tokens: ClassVar[bool] = True
    server_knobs: ClassVar[tuple[str, ...]] = ("policy",)
    former_names: ClassVar[dict[str, str]] = {
        "budget": "budget_tokens",
        "full_layers": "dense_layers",
        "lists": "list_per",
    }

    budget_tokens: BudgetTokens = 2048
    dense_layers: Annotated[
        int | None,
        Field(ge=0, le=1024, description="first layers, dense; the next one selects; by default 2, or the policy's"),
    ] = None
    reselect_layers: Annotated[
        tuple[Annotated[int, Field(strict=True)], ...],
        Field(description="layers that select again; empty: every third; the paper's: 13 of 32 layers", strict=False),
    ] = ()
    policy: Annotated[
        str,
        Field(
            description="file of each layer's role and a budget, by vllm-sparse calibrate tidal or by hand, or "
            f"the name of one of the package: {', '.join(shipped())}"
        ),
    ] = ""
    sink_tokens: SinkTokens = 16
    recent_tokens: RecentTokens = 64
    list_per: Annotated[
        Literal["kv_head", "query_head"],
        Field(description="heads that share a list", json_schema_extra={"limit": "list_per", "compiles": True}),
    ] = "kv_head"
    selection_reads: Annotated[
        Literal["everything", "list"],
        Field(description="what a layer that selects reads itself: the list it chose, or everything, as in the paper"),
    ] = "list"

    @classmethod
    def knobs_of_files(cls, knobs: Mapping[str, Any]) -> Mapping[str, Any]:
        """The policy's budget and `selection_reads`, where the policy is followed."""
        if knobs.get("dense_layers") is not None or knobs.get("reselect_layers"):
            return {}
        try:
            policy = load(knobs["policy"]).contents
        except (KeyError, TypeError, ValueError):
            # None given, or a wrong one, of which the check of the knob tells.
            return {}
        held = {"budget_tokens": policy.budget_tokens, "selection_reads": policy.selection_reads}
        return {knob: value for knob, value in held.items() if value is not None}

    def __post_init__(self) -> None:
        # Equal sets of layers are equal settings, which share cached blocks.
        object.__setattr__(self, "reselect_layers", tuple(sorted(set(self.reselect_layers))))
        if self.policy:
            try:
                load(self.policy)
            except ValueError as error:
                raise KnobError("policy", self.policy, str(error)) from error
        self.check_budget()

    @property
    def follows_policy(self) -> bool:
        """The policy tells the layers' roles."""
        return bool(self.policy) and self.dense_layers is None and not self.reselect_layers

    @property
    def weighs_masses(self) -> bool:
        return self.list_per == "kv_head"

    @property
    def fingerprint(self) -> str:
        return load(self.policy).digest if self.follows_policy else ""

    def check_defaults(self, num_layers: int, num_query_heads: int) -> None:
        if not self.policy:
            return
        for knob, value in (("dense_layers", self.dense_layers), ("reselect_layers", list(self.reselect_layers))):
            if value not in (None, []):
                raise KnobError(
                    knob, value, f"policy {self.policy!r} would never be used beside it; drop one of the two"
                )
        self.layer_roles(num_layers)

    def layer_roles(self, num_layers: int) -> list[Role]:
        return self.with_selection_reads(self._roles(num_layers))

    def with_selection_reads(self, roles: Sequence[Role]) -> list[Role]:
        """Roles in which layers that select read what the knob says."""
        writing = Role.DENSE_AND_WRITE if self.selection_reads == "everything" else Role.WRITE_AND_READ
        return [writing if role.writes_list else role for role in roles]

    def _roles(self, num_layers: int) -> list[Role]:
        """Roles where layers that select read everything."""
        if self.follows_policy:
            roles = load(self.policy).contents.roles
            if len(roles) != num_layers:
                raise KnobError(
                    "policy", self.policy, f"the file holds roles of {len(roles)} layers; the model has {num_layers}"
                )
            return list(roles)
        first = DENSE_LAYERS if self.dense_layers is None else self.dense_layers
        if first >= num_layers:
            raise KnobError(
                "dense_layers", first, f"this model has {num_layers} layers, so 0 to {num_layers - 1} are allowed"
            )
        for layer in self.reselect_layers:
            if not first < layer < num_layers:
                raise KnobError(
                    "reselect_layers",
                    list(self.reselect_layers),
                    f"this model has {num_layers} layers and selects first in layer {first}, so layers {first + 1} to "
                    f"{num_layers - 1} are allowed",
                )
        # The last layer would choose for no other.
        again = self.reselect_layers or range(first + LAYERS_OF_A_LIST, num_layers - 1, LAYERS_OF_A_LIST)
        return [
            Role.DENSE if layer < first else Role.DENSE_AND_WRITE if layer == first or layer in again else Role.READ
            for layer in range(num_layers)
        ]

    def select(
        self, query: torch.Tensor, keys: PagedKeys, scale: float, page_size_tokens: int, memory: LayerMemory
    ) -> PageList:
        context = keys.seq_len
        scores = token_scores(query, keys, scale, merge_heads=self.list_per == "kv_head")
        page = page_size_tokens
        budget = TokenBudget(self.budget_tokens, self.sink_tokens, self.recent_tokens)
        return top_pages(best_of_pages(scores, page), context, page, page, budget)

    def serves(self, method: DecodeMethod, max_seq_len: int) -> bool:
        return isinstance(method, Tidal) and method.list_per == "kv_head"

    def choose_rows(self, rows: DecodeRows, knobs: torch.Tensor, place: RowsPlace, lists: TokenLists) -> None:
        # Imported here: there is Triton only where there is a GPU.
        from vllm_sparse.kernels.token_scores.triton import token_scores_of_rows

        top_tokens(token_scores_of_rows(rows, place.starts, place.capacity_tokens), rows, knobs, lists)
