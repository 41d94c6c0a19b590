"""The ``"sparse"`` object of ``--additional-config``, with one object of knobs for each method of the registry."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, create_model, field_validator

from vllm_sparse.config.limits import Limits
from vllm_sparse.config.names import DENSE, METHODS
from vllm_sparse.methods.knobs import UNBOUNDED_TOKENS
from vllm_sparse.methods.registry import DEFAULT_METHODS

# Of a dense prompt chunk's time; a server that measures bounds nothing.
MOST_PROMPT_COST = 1000.0


class ServerSettings(BaseModel):
    """What the ``"sparse"`` object holds whichever methods there are.

    Attributes:
        preset: preset of requests that name none, or ``dense``; what `prefill` and `decode` name wins in its phase.
        prefill: method of requests that name none; None: the preset's.
        decode: likewise for decoding.
        methods: methods that requests may choose; by default those that say so of themselves
            (`Method.enabled_by_default`) and, at the start, those that `preset` needs.
        min_tokens: contexts shorter than this run dense, unless the request says otherwise.
        min_recall: share of the attention mass that lists have to keep, unless the request says otherwise; where a
            sampled row keeps less, the request's layer goes dense; 0: nothing is checked.
        unprofitable: what runs where the costs of the GPU say that sparse would take longer than dense, unless the
            request says otherwise: ``dense``, or ``sparse`` as asked. On a CPU nothing is known of costs.
        prompt_cost: the longest that a sparse prompt chunk may take by the costs of the GPU, in times of a dense one;
            what would take longer runs dense, whatever the request says, and is counted.
        decode_in_batches: on a GPU, serve the sparse decode rows of a step at once, inside CUDA graphs; false saves
            their memory and start-up time, and serves one request after the other between PIECEWISE graphs.
        decode_list_tokens: tokens of the longest decode list that a GPU server keeps room for and CUDA graphs hold;
            requests that ask for longer ones are refused.
        executor: on a GPU, the stock kernel that reads lists and whole contexts: ``auto``, the device's own
            (`backend.executors.rule`), ``flash_attention`` or ``triton``. Which FlashAttention:
            ``--attention-config.flash_attn_version``.
        timing_interval_steps: in one of so many steps with sparse rows, selection and attention are timed; 0: never.
        recall_interval_steps: in one of so many with sparse rows of a phase, the recall of one row in one layer is
            measured; 0: never.
        limits: the most that requests may ask for.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    preset: str = DENSE
    prefill: str | None = None
    decode: str | None = None
    methods: tuple[str, ...] = Field(default=DEFAULT_METHODS, strict=False)
    min_tokens: int = Field(default=8192, ge=0, le=UNBOUNDED_TOKENS)
    min_recall: float = Field(default=0.0, ge=0, le=1, allow_inf_nan=False)
    unprofitable: Literal["dense", "sparse"] = "dense"
    prompt_cost: float = Field(default=1.2, ge=1, le=MOST_PROMPT_COST, allow_inf_nan=False)
    decode_in_batches: bool = True
    decode_list_tokens: int = Field(default=4352, ge=16, le=1 << 24)
    executor: Literal["auto", "flash_attention", "triton"] = "auto"
    timing_interval_steps: int = Field(default=100, ge=0)
    recall_interval_steps: int = Field(default=200, ge=0)
    limits: Limits = Limits()

    @field_validator("methods")
    @classmethod
    def _known_methods(cls, methods: tuple[str, ...]) -> tuple[str, ...]:
        for method in methods:
            if method not in METHODS:
                raise ValueError(f"{method!r} is no method; there are {', '.join(METHODS)}")
        return methods

    def default_method(self, phase: str) -> str | None:
        """Name of the method of requests that name neither one nor a preset, or ``dense``; None: the preset chooses."""
        named = {"prefill": self.prefill, "decode": self.decode}[phase]
        return DENSE if named is None and self.preset == DENSE else named

    def knobs(self, method: str) -> dict[str, Any]:
        """Default knobs of a method, those of all its phases."""
        knobs: dict[str, Any] = getattr(self, method)
        return knobs


if TYPE_CHECKING:

    class ServerConfig(ServerSettings):
        """The ``"sparse"`` object: `ServerSettings`, and a field of default knobs for each method of the registry."""

        def __init__(self, **settings: Any) -> None: ...

else:
    # Type checkers cannot follow fields that are made while the program runs.
    ServerConfig = create_model(
        "ServerConfig",
        __base__=ServerSettings,
        __module__=__name__,
        **{method: (dict[str, Any], Field(default={})) for method in METHODS},
    )
