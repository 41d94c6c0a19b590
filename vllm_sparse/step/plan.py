"""One step's plan: which rows of the batch are sparse, by which method, and why others that asked for it are dense."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

from vllm_sparse.step.eligibility import DenseReason, ScoringRoom, why_decode_is_dense, why_prefill_is_dense
from vllm_sparse.step.roles import reading_layers

if TYPE_CHECKING:
    from vllm.v1.attention.backend import CommonAttentionMetadata

    from vllm_sparse.kernels.page_summaries import SummaryKind
    from vllm_sparse.methods.decode import DecodeMethod, LayerMemory
    from vllm_sparse.methods.prefill import PrefillMethod
    from vllm_sparse.step.guard import RequestGuard
    from vllm_sparse.step.requests import RowSetting, SparseRequest
    from vllm_sparse.step.roles import Role

# Phase, name of the method, reason.
Fallback = tuple[str, str, DenseReason]


@dataclass(frozen=True)
class RowSpan:
    """A request's place in the step's tensors.

    Attributes:
        row: index in the batch.
        query_start: its first token in the step's query tensor.
        query_tokens: its tokens in this step.
        seq_len: tokens in its KV cache, this step's included.
    """

    row: int
    query_start: int
    query_tokens: int
    seq_len: int


@dataclass(frozen=True)
class PrefillRow:
    """A request whose prompt chunk is sparse.

    Attributes:
        span: its place.
        method: chooses its lists.
        guard: of the request, if it has one; written while the step runs.
        prompt_tokens: as of `SparseRequest`.
    """

    span: RowSpan
    method: PrefillMethod
    guard: RequestGuard | None = None
    prompt_tokens: int | None = None

    def is_sparse(self, layer: int) -> bool:
        """Whether it reads lists in a layer; asked when the layer runs."""
        return layer >= self.method.dense_layers and (self.guard is None or layer not in self.guard.dense_layers)


@dataclass(frozen=True)
class DecodeRow:
    """A request whose decode step is sparse and is served alone.

    Attributes:
        span: its place.
        method: chooses its lists.
        roles: role of each layer.
        memory: what the method keeps of the request from step to step, by layer; written while the step runs.
        guard: of the request, if it has one.
    """

    span: RowSpan
    method: DecodeMethod
    roles: tuple[Role, ...]
    memory: dict[int, LayerMemory]
    guard: RequestGuard | None = None


@dataclass(frozen=True)
class BatchRow:
    """A request whose decode step is sparse and is served with all others of the step at once.

    Attributes:
        span: its place.
        setting: what the device is told of it.
        guard: of the request, if it has one.
    """

    span: RowSpan
    setting: RowSetting
    guard: RequestGuard | None = None

    @property
    def roles(self) -> tuple[Role, ...]:
        """Role of each layer."""
        return self.setting.roles


@dataclass(frozen=True)
class SummaryRow:
    """A request whose new keys are summarised, sparse or dense, in the layers in which its decode method chooses."""

    span: RowSpan
    method: DecodeMethod
    kind: SummaryKind
    roles: tuple[Role, ...]


@dataclass(frozen=True)
class StepPlan:
    """Sparse rows of one step.

    Attributes:
        num_layers: attention layers of the model.
        spans: all rows that hold tokens, in batch order.
        summarising: rows whose new keys are summarised.
        prefill: sparse prompt chunks.
        decode: sparse decode rows that are served one by one.
        batch: sparse decode rows that are served at once.
        fallbacks: how many rows asked for a method and run dense, in some layers at least where recall was low.
    """

    num_layers: int
    spans: tuple[RowSpan, ...] = ()
    summarising: tuple[SummaryRow, ...] = ()
    prefill: tuple[PrefillRow, ...] = ()
    decode: tuple[DecodeRow, ...] = ()
    batch: tuple[BatchRow, ...] = ()
    fallbacks: Mapping[Fallback, int] = field(default_factory=dict)

    @property
    def is_dense(self) -> bool:
        """Every row runs dense and leaves nothing behind for later steps."""
        return not (self.batch or self.decode or self.prefill or self.summarising)


@dataclass(frozen=True)
class PlanLimits:
    """What a server's plans depend on.

    Attributes:
        num_layers: attention layers of the model.
        speculative: the server drafts tokens; verification rows run dense.
        scored_tokens: tokens that there is room to score of decode rows that are served at once.
        serves_at_once: whether decode rows with a method are served at once.
    """

    num_layers: int
    speculative: bool = False
    scored_tokens: int = 0
    serves_at_once: Callable[[DecodeMethod], bool] = lambda method: False


def plan_step(
    common: CommonAttentionMetadata, sparse_rows: Mapping[int, SparseRequest], limits: PlanLimits
) -> StepPlan:
    """Decide which rows of a step run sparse.

    Args:
        common: vLLM's description of the step.
        sparse_rows: the rows whose request is not all dense.
        limits: of the server.
    """
    if not sparse_rows or common.causal is not True:
        return StepPlan(limits.num_layers)
    starts = common.query_start_loc_cpu.tolist()
    assert common.seq_lens_cpu_upper_bound is not None
    seq_lens = common.seq_lens_cpu_upper_bound.tolist()
    prefilling = [] if common.is_prefilling is None else common.is_prefilling.tolist()
    spans = tuple(
        RowSpan(row, starts[row], starts[row + 1] - starts[row], seq_lens[row])
        for row in range(common.num_reqs)
        if starts[row + 1] > starts[row]
    )
    summarising: list[SummaryRow] = []
    prefill: list[PrefillRow] = []
    decode: list[DecodeRow] = []
    batch: list[BatchRow] = []
    fallbacks: Counter[Fallback] = Counter()
    room = ScoringRoom(limits.scored_tokens)
    for span in spans:
        request = sparse_rows.get(span.row)
        if request is None:
            continue
        params, guard = request.params, request.guard
        if params.decode is not None and params.decode.summaries is not None and not limits.speculative:
            roles = layer_roles(params.decode, limits.num_layers)
            summarising.append(SummaryRow(span, params.decode, params.decode.summaries, roles))
        in_prompt = span.row < len(prefilling) and prefilling[span.row]
        if in_prompt or (span.query_tokens > 1 and not limits.speculative):
            if params.prefill is None:
                continue
            sparse = range(params.prefill.dense_layers, limits.num_layers)
            still_sparse = sparse if guard is None else guard.sparse_layers(sparse)
            has_sparse_layers = guard is None or bool(still_sparse)
            reason = why_prefill_is_dense(
                params.prefill, params.min_tokens, span.query_tokens, span.seq_len, has_sparse_layers
            )
            if reason is None:
                prefill.append(PrefillRow(span, params.prefill, guard, request.prompt_tokens))
                reason = DenseReason.LOW_RECALL if len(still_sparse) < len(sparse) else None
            if reason is not None:
                fallbacks["prefill", params.prefill.name, reason] += 1
        elif params.decode is not None:
            at_once = limits.serves_at_once(params.decode)
            of_method = request.roles
            if of_method is None:
                of_method = request.roles = layer_roles(params.decode, limits.num_layers)
            roles = of_method if guard is None else guard.roles(of_method)
            reason = why_decode_is_dense(
                params.decode,
                params.min_tokens,
                span.seq_len,
                limits.speculative,
                room if at_once else None,
                roles is of_method or bool(reading_layers(roles)),
            )
            if reason is None:
                if at_once:
                    batch.append(BatchRow(span, request.row_setting(roles), guard))
                else:
                    decode.append(DecodeRow(span, params.decode, roles, request.memory, guard))
                low = roles is not of_method and len(reading_layers(roles)) < len(reading_layers(of_method))
                reason = DenseReason.LOW_RECALL if low else None
            if reason is not None:
                fallbacks["decode", params.decode.name, reason] += 1
    return StepPlan(
        limits.num_layers, spans, tuple(summarising), tuple(prefill), tuple(decode), tuple(batch), fallbacks
    )


@lru_cache(maxsize=1024)
def layer_roles(method: DecodeMethod, num_layers: int) -> tuple[Role, ...]:
    """A method's layer roles, worked out once."""
    return tuple(method.layer_roles(num_layers))
