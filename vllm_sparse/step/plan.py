"""One step's plan: which rows of the batch are sparse, by which method, and why others that asked for it are dense."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from vllm_sparse.step.eligibility import (
    DenseReason,
    ScoringRoom,
    dense_first_tokens,
    why_decode_is_dense,
    why_prefill_is_dense,
)
from vllm_sparse.step.roles import held_roles, reading_layers

if TYPE_CHECKING:
    from vllm.v1.attention.backend import CommonAttentionMetadata

    from vllm_sparse.kernels.page_summaries import SummaryKind
    from vllm_sparse.methods.decode import DecodeMethod, LayerMemory
    from vllm_sparse.methods.prefill import PrefillMethod
    from vllm_sparse.step.costs import RowGain, StepCosts
    from vllm_sparse.step.guard import RequestGuard
    from vllm_sparse.step.requests import RowSetting, SparseRequest
    from vllm_sparse.step.roles import Role

# Phase, name of the method, reason.
Fallback = tuple[str, str, DenseReason]


class RowSpan(NamedTuple):
    """A request's place in the step's tensors; a tuple, because large batches make many.

    Attributes:
        row: index in the batch.
        query_start: its first token in the step's query tensor.
        query_tokens: its tokens in this step.
        seq_len: tokens in its KV cache, this step's included.
        later_tokens: tokens of the request that follow in the same step, in another span, and are not counted above.
    """

    row: int
    query_start: int
    query_tokens: int
    seq_len: int
    later_tokens: int = 0

    def split(self, tokens: int) -> tuple[RowSpan, RowSpan]:
        """The first tokens of the step, so many, and the others."""
        rest = self.query_tokens - tokens
        return (
            RowSpan(self.row, self.query_start, tokens, self.seq_len - rest, rest),
            RowSpan(self.row, self.query_start + tokens, rest, self.seq_len),
        )


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


class DenseStepRow(NamedTuple):
    """A request whose decode step reads everything because its method's `dense_every_steps` says so.

    Attributes:
        span: its place.
        method: of its other steps.
        roles: role of each layer in these.
    """

    span: RowSpan
    method: DecodeMethod
    roles: tuple[Role, ...]


@dataclass(frozen=True)
class SummaryRow:
    """A request whose keys are summarised in the layers in which its decode method chooses.

    The first step of a request summarises all of its keys, because requests that keep no summaries may have written
    the blocks that it found in the prefix cache. Later ones summarise what is new. A sparse decode row's keys are
    summarised in each step. A row that becomes sparse summarises the block that it is in, so a dense one's keys need
    not be before they fill a block. Where it is dense because sparse does not pay they are not even then: it may never
    become sparse, and if it does, that step summarises what is missing.

    Attributes:
        span: its place.
        method: of its decoding.
        kind: of summary.
        roles: role of each layer.
        first_token: first token whose summary is missing.
        catches_up: more is missing than the block that its newest token is in.
    """

    span: RowSpan
    method: DecodeMethod
    kind: SummaryKind
    roles: tuple[Role, ...]
    first_token: int
    catches_up: bool


@dataclass(frozen=True)
class StepPlan:
    """Sparse rows of one step.

    Attributes:
        layers: numbers of the attention layers that this process holds.
        spans: all rows that hold tokens, in batch order; two of a prompt chunk whose first tokens alone are dense,
            because they lie before its request's `min_tokens`.
        summarising: rows whose new keys are summarised.
        prefill: sparse prompt chunks.
        decode: sparse decode rows that are served one by one.
        batch: sparse decode rows that are served at once.
        fallbacks: how many rows asked for a method and run dense, in some layers at least where recall was low.
        dense_steps: rows that run dense because their settings ask for it; the device sees no more in them than in
            those of dense requests.
    """

    layers: range
    spans: tuple[RowSpan, ...] = ()
    summarising: tuple[SummaryRow, ...] = ()
    prefill: tuple[PrefillRow, ...] = ()
    decode: tuple[DecodeRow, ...] = ()
    batch: tuple[BatchRow, ...] = ()
    fallbacks: Mapping[Fallback, int] = field(default_factory=dict)
    dense_steps: tuple[DenseStepRow, ...] = ()

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
        costs: of the server's GPU; None: rows are sparse whether or not it pays.
        prompt_cost: the longest that a sparse prompt chunk may take by them, in times of a dense one, where its request
            is to be sparse whether or not it pays.
        full_graph: the step replays a FULL CUDA graph.
        graphs_hold: whether CUDA graphs hold decode rows of requests in a step of so many rows.
        block_tokens: of a KV-cache block.
        soft_cap: the model caps its attention logits.
        held: numbers of the layers that this process holds; None: all.
        judged_apart: ranks that have to replay the same CUDA graphs judge guarded rows apart, so which rows are sparse
            and what a step costs may not follow from their judgement.
    """

    num_layers: int
    speculative: bool = False
    scored_tokens: int = 0
    serves_at_once: Callable[[DecodeMethod], bool] = lambda method: False
    costs: StepCosts | None = None
    full_graph: bool = False
    graphs_hold: Callable[[Sequence[SparseRequest], int], bool] = lambda requests, rows: True
    block_tokens: int = 1
    prompt_cost: float = math.inf
    soft_cap: bool = False
    held: range | None = None
    judged_apart: bool = False

    @property
    def layers(self) -> range:
        """Numbers of the layers that this process holds."""
        return range(self.num_layers) if self.held is None else self.held


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
        return StepPlan(limits.layers)
    starts = common.query_start_loc_cpu.tolist()
    assert common.seq_lens_cpu_upper_bound is not None
    seq_lens = common.seq_lens_cpu_upper_bound.tolist()
    prefilling = [] if common.is_prefilling is None else common.is_prefilling.tolist()
    lengths = [end - start for start, end in itertools.pairwise(starts)]
    places = zip(range(common.num_reqs), starts, lengths, seq_lens, itertools.repeat(0), strict=False)
    spans = tuple(map(RowSpan._make, places))
    if 0 in lengths:
        spans = tuple(span for span in spans if span.query_tokens > 0)
    summarising: list[SummaryRow] = []
    prefill: list[PrefillRow] = []
    candidates: list[_Candidate] = []
    dense_steps: list[DenseStepRow] = []
    gains = _Gains()
    fallbacks: Counter[Fallback] = Counter()
    room = ScoringRoom(limits.scored_tokens)
    split: dict[int, tuple[RowSpan, RowSpan]] = {}
    for span in spans:
        request = sparse_rows.get(span.row)
        if request is None:
            continue
        params, guard = request.params, request.guard
        as_asked = params.unprofitable == "sparse"
        costs = None if as_asked else limits.costs
        in_prompt = span.row < len(prefilling) and prefilling[span.row]
        if in_prompt or (span.query_tokens > 1 and not limits.speculative):
            _summarise(summarising, span, request, limits)
            if params.prefill is None:
                continue
            held = limits.layers
            sparse = range(max(params.prefill.dense_layers, held.start), held.stop)
            still_sparse = sparse if guard is None else guard.sparse_layers(sparse)
            has_sparse_layers = not sparse or bool(still_sparse)
            reason = why_prefill_is_dense(
                params.prefill,
                params.min_tokens,
                span.query_tokens,
                span.seq_len,
                has_sparse_layers,
                limits.costs,
                limits.prompt_cost if as_asked else None,
                limits.soft_cap,
            )
            if reason is None:
                dense_tokens = dense_first_tokens(params.min_tokens, span.query_tokens, span.seq_len)
                if dense_tokens:
                    split[span.row] = span.split(dense_tokens)
                sparse_span = split[span.row][1] if dense_tokens else span
                prefill.append(PrefillRow(sparse_span, params.prefill, guard, request.prompt_tokens))
                reason = DenseReason.LOW_RECALL if len(still_sparse) < len(sparse) else None
            if reason is not None:
                fallbacks["prefill", params.prefill.name, reason] += 1
        elif params.decode is not None:
            at_once = limits.serves_at_once(params.decode)
            of_method = request.roles
            if of_method is None:
                of_method = request.roles = layer_roles(params.decode, limits.num_layers, limits.held)
            roles = of_method if guard is None else guard.roles(of_method)
            agreed = of_method if limits.judged_apart else roles
            pays, gain = True, None
            if costs is not None:
                known = request.gain
                if known is None or known.roles is not agreed:
                    known = _learn_gain(request, agreed, at_once, costs, limits)
                gain = known.at(span.seq_len)
                pays = gain > 0 if at_once else _pays_alone(request, gain, costs, limits.full_graph)
            is_dense_step = params.decode.is_dense_step(span.seq_len)
            reason = why_decode_is_dense(
                params.decode,
                params.min_tokens,
                span.seq_len,
                limits.speculative,
                room if at_once and not is_dense_step else None,
                agreed is of_method or bool(reading_layers(agreed)),
                pays,
                limits.soft_cap,
            )
            if reason is None and not is_dense_step:
                candidates.append((span, request, roles, at_once, gain))
                if at_once:
                    gains.add(request, params.decode.name, gain)
                continue
            if reason is None:
                dense_steps.append(DenseStepRow(span, params.decode, roles))
            else:
                fallbacks["decode", params.decode.name, reason] += 1
            request.catches_up = False
            fills_block = span.seq_len % limits.block_tokens == 0 or not request.summarised_tokens
            if fills_block and (reason is None or costs is None):
                _summarise(summarising, span, request, limits)
    decode: list[DecodeRow] = []
    batch: list[BatchRow] = []
    all_sparse = len(candidates) == len(spans)
    paying = None if limits.costs is None else gains.paying(all_sparse, limits.costs, limits.full_graph)
    for span, request, roles, at_once, gain in candidates:
        method = request.params.decode
        assert method is not None
        if gain is not None:
            pays = paying is None or not at_once or (method.name, request.in_graph) in paying
            behind = _is_behind(span, request, limits)
            if not pays or (behind and limits.full_graph):
                fallbacks["decode", method.name, DenseReason.UNPROFITABLE] += 1
                if behind and request.catches_up and not limits.full_graph:
                    # The step left the graphs for it, in which sparse pays, if not here.
                    _summarise(summarising, span, request, limits)
                request.catches_up = pays
                continue
        _summarise(summarising, span, request, limits)
        if at_once:
            batch.append(BatchRow(span, request.row_setting(roles), request.guard))
        else:
            decode.append(DecodeRow(span, method, roles, request.memory, request.guard))
        of_method = request.roles
        if roles is not of_method and len(reading_layers(roles)) < len(reading_layers(of_method or ())):
            fallbacks["decode", method.name, DenseReason.LOW_RECALL] += 1
    if split:
        spans = tuple(part for span in spans for part in split.get(span.row, (span,)))
    return StepPlan(
        limits.layers,
        spans,
        tuple(summarising),
        tuple(prefill),
        tuple(decode),
        tuple(batch),
        fallbacks,
        tuple(dense_steps),
    )


# A decode row that is sparse if nothing else of the step speaks against it: its place, request, roles, whether it is
# served at once, and the seconds that it saves the step; None if it is sparse whatever the step gains.
_Candidate = tuple[RowSpan, "SparseRequest", "tuple[Role, ...]", bool, float | None]


class _Gains:
    """What the rows of a step that are served at once save it together, by their methods.

    Attributes:
        held: rows that CUDA graphs hold.
        outside: others.
        leaving: requests of these.
        forced: methods of rows that are sparse whatever the step gains; in `held` too.
        has_guards: a row's layers may go dense.
    """

    def __init__(self) -> None:
        self.held: dict[str, float] = {}
        self.outside: dict[str, float] = {}
        self.leaving: list[SparseRequest] = []
        self.forced: set[str] = set()
        self.has_guards = False

    def add(self, request: SparseRequest, method: str, gain: float | None) -> None:
        """Add a row.

        Args:
            request: of the row.
            method: its name.
            gain: seconds that the row saves, launches aside; None if it is sparse whatever the step gains.
        """
        if request.guard is not None:
            self.has_guards = True
        if gain is None:
            self.forced.add(method)
            self.held.setdefault(method, 0.0)
        elif request.in_graph:
            self.held[method] = self.held.get(method, 0.0) + gain
        else:
            self.outside[method] = self.outside.get(method, 0.0) + gain
            self.leaving.append(request)

    def paying(self, all_sparse: bool, costs: StepCosts, full_graph: bool) -> Collection[tuple[str, bool | None]]:
        """Which rows are sparse in this step: methods, and whether graphs hold the rows.

        Args:
            all_sparse: the step has no other rows.
            costs: of the GPU.
            full_graph: the step replays a FULL CUDA graph.
        """
        if self.outside:
            # For all of them together it may pay to leave the graphs; a step that replays one decides for the next.
            _, least = costs.sparse_methods(self.held, self.forced, False, True)
            names = dict.fromkeys([*self.held, *self.outside])
            together = {name: self.held.get(name, 0.0) + self.outside.get(name, 0.0) for name in names}
            _, gained = costs.sparse_methods(together, together, False, False)
            leaves = gained > max(least, 0.0) + costs.margin_seconds
            for request in self.leaving:
                _leave_graphs(request, leaves)
            if leaves and not full_graph:
                return [(name, held) for name in together for held in (True, False)]
        methods, _ = costs.sparse_methods(self.held, self.forced, all_sparse and not self.has_guards, full_graph)
        return [(name, True) for name in methods]


def _summarise(rows: list[SummaryRow], span: RowSpan, request: SparseRequest, limits: PlanLimits) -> None:
    """Add a row to those whose keys are summarised, if its decode method asks for that."""
    if request.summaries is not None and not limits.speculative:
        assert request.params.decode is not None
        if request.roles is None:
            request.roles = layer_roles(request.params.decode, limits.num_layers, limits.held)
        first_token = min(request.summarised_tokens, span.seq_len - span.query_tokens)
        behind = _is_behind(span, request, limits)
        request.summarised_tokens, request.catches_up = span.seq_len, False
        rows.append(SummaryRow(span, request.params.decode, request.summaries, request.roles, first_token, behind))


def _is_behind(span: RowSpan, request: SparseRequest, limits: PlanLimits) -> bool:
    """Whether keys before this step have no summaries, other than in the block that the newest token is in."""
    if request.summaries is None:
        return False
    newest_block = (span.seq_len - 1) // limits.block_tokens * limits.block_tokens
    return request.summarised_tokens < min(newest_block, span.seq_len - span.query_tokens)


def _learn_gain(
    request: SparseRequest, roles: tuple[Role, ...], at_once: bool, costs: StepCosts, limits: PlanLimits
) -> RowGain:
    """Work out once what a request's decode rows save a step, and whether graphs hold them."""
    assert request.params.decode is not None
    request.gain = costs.row_gain(request.params.decode, roles)
    request.in_graph = at_once and limits.graphs_hold([request], 1)
    return request.gain


def _pays_alone(request: SparseRequest, gain: float, costs: StepCosts, full_graph: bool) -> bool:
    """Whether a row that is served alone is sparse: it shares no launches, and makes a step leave the graphs."""
    pays = gain > costs.outside_seconds
    _leave_graphs(request, pays)
    return pays and not full_graph


def _leave_graphs(request: SparseRequest, leaves: bool) -> None:
    """Say whether steps with a request's decode rows, which no CUDA graph holds, are to leave the graphs from now on.

    Dense rows need not: where sparse does not pay, their keys are not summarised.
    """
    request.leaves_graphs = leaves


@lru_cache(maxsize=1024)
def layer_roles(method: DecodeMethod, num_layers: int, held: range | None = None) -> tuple[Role, ...]:
    """A method's layer roles in this process, worked out once.

    Args:
        method: with its knobs.
        num_layers: attention layers of the model.
        held: numbers of those that this process holds; None: all.
    """
    roles = tuple(method.layer_roles(num_layers))
    return roles if held is None else held_roles(roles, held)
