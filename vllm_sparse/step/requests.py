"""Which slot of the model runner holds which request that is not all dense.

vLLM hands sampling parameters to logits processors on both model runners, so one is registered that touches no logits
(`vllm_sparse.hooks.logits_processor`) and feeds `TABLE`. Runner V2 calls `add_request` with a slot and names each row's
slot in the attention metadata (`req_idx`); runner V1 reports batch changes, and row ``i`` of the metadata is index
``i``.
"""

from __future__ import annotations

import itertools
import weakref
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from vllm_sparse.config.request import ALL_DENSE, RESOLVED_KEY, SparseParams, deserialize
from vllm_sparse.methods.decode import BatchDecodeMethod
from vllm_sparse.step.eligibility import longest_dense_seq_len
from vllm_sparse.step.guard import RequestGuard

if TYPE_CHECKING:
    import numpy as np
    from vllm.sampling_params import SamplingParams

    from vllm_sparse.kernels.page_summaries import SummaryKind
    from vllm_sparse.methods.decode import LayerMemory
    from vllm_sparse.step.costs import RowGain
    from vllm_sparse.step.roles import Role


@dataclass(frozen=True)
class RowSetting:
    """What the host tells the device of a decode row that is served at once with others.

    Attributes:
        method: the request's, or None for a dense row.
        longest_dense_seq_len: the row is dense unless its context, with this step's token, is longer.
        roles: role of each layer.
        slot: place of the request in what methods keep from step to step.
        fresh: another request held the slot before this step.
    """

    method: BatchDecodeMethod | None
    longest_dense_seq_len: int
    roles: tuple[Role, ...]
    slot: int
    fresh: bool


@dataclass
class SparseRequest:
    """A request that is not all dense, as the model runner holds it.

    Attributes:
        params: its resolved parameters.
        prompt_tokens: of its prompt; None where vLLM does not say (runner V1 with prompt embeddings).
        slot: of this request alone while it is held, the lowest that was free.
        setting: of its row in the steps after its first sparse one in its slot.
        memory: what its decode method keeps from step to step, by layer, where it is served alone.
        roles: of its decode method in the model's layers, once a step has asked: hashing a method takes longer than
            a large batch has time for.
        gain: of its decode rows, once a step has asked.
        in_graph: CUDA graphs hold its decode rows, once a step has asked.
        leaves_graphs: no CUDA graph is replayed for steps with its decode rows unless it holds them; False while none
            does and the rows are dense.
        guard: what the guard knows of it; None unless it asks for one.
        summaries: what its decode method asks to be kept of each page's keys.
        summarised_tokens: so many of its first keys have been summarised.
        catches_up: its next step leaves the CUDA graphs, which summarise the newest block alone: the request is new,
            or becomes sparse after steps in which its keys were not summarised.
    """

    params: SparseParams
    prompt_tokens: int | None = None
    slot: int = 0
    setting: RowSetting | None = None
    memory: dict[int, LayerMemory] = field(default_factory=dict)
    roles: tuple[Role, ...] | None = None
    gain: RowGain | None = None
    in_graph: bool | None = None
    leaves_graphs: bool = True
    summarised_tokens: int = 0
    catches_up: bool = True
    guard: RequestGuard | None = field(init=False)
    summaries: SummaryKind | None = field(init=False)

    def __post_init__(self) -> None:
        self.summaries = None if self.params.decode is None else self.params.decode.summaries
        self.guard = RequestGuard(self.params.min_recall) if self.params.min_recall else None

    def row_setting(self, roles: tuple[Role, ...]) -> RowSetting:
        """The setting of its row in a sparse step; from its first one on its slot holds what it keeps.

        Args:
            roles: of the model's layers.
        """
        if self.setting is not None:
            if self.setting.roles is not roles:
                self.setting = replace(self.setting, roles=roles)
            return self.setting
        method = self.params.decode
        assert isinstance(method, BatchDecodeMethod)
        least = longest_dense_seq_len(method, self.params.min_tokens)
        fresh = RowSetting(method, least, roles, self.slot, True)
        self.setting = replace(fresh, fresh=False)
        return fresh


class RequestTable:
    """Sparse requests by slot; slots of dense requests are absent."""

    def __init__(self) -> None:
        self._requests: dict[int, SparseRequest] = {}
        # By the identity of the sampling parameters, for as long as the model runner holds them.
        self._known: dict[int, SparseRequest] = {}
        self.attached = False
        """A model runner feeds this table."""
        self.slots_in_metadata = False
        """Rows name their slots (runner V2); else row i is slot i (runner V1)."""
        self.full_graph = False
        """The current step replays a FULL CUDA graph (runner V2)."""
        self.dummy_step = False
        """The current step holds no requests (runner V2's idle data-parallel steps)."""

    def attach(self, slots_in_metadata: bool) -> None:
        """Start over for a new model runner."""
        self._requests.clear()
        self._known.clear()
        self.attached = True
        self.slots_in_metadata = slots_in_metadata

    def set(self, slot: int, sampling_params: SamplingParams, prompt_tokens: int | None = None) -> None:
        """A new request enters a slot, which may hold a former request; arguments as of `SparseRequest`."""
        resolved = (sampling_params.extra_args or {}).get(RESOLVED_KEY)
        params = ALL_DENSE if resolved is None else deserialize(resolved)
        self.take(slot)
        if not params.is_dense:
            self.put(slot, SparseRequest(params, prompt_tokens, self._free_slot()))

    def set_again(self, slot: int, sampling_params: SamplingParams, prompt_tokens: int | None = None) -> None:
        """As `set`, but the request may have been in the batch before: runner V1 takes one out of it for each step
        that does not schedule it, with a pipeline every other one, and holds on to its sampling parameters."""
        key = id(sampling_params)
        if (known := self._known.get(key)) is not None:
            self.take(slot)
            known.slot, known.setting = self._free_slot(), None
            self.put(slot, known)
            return
        self.set(slot, sampling_params, prompt_tokens)
        if slot in self._requests:
            self._known[key] = self._requests[slot]
            weakref.finalize(sampling_params, self._known.pop, key, None).atexit = False

    def forget(self, sampling_params: SamplingParams) -> None:
        """A request was preempted, and what was known of its keys went with its blocks: it starts anew."""
        self._known.pop(id(sampling_params), None)

    def _free_slot(self) -> int:
        taken = {request.slot for request in self._requests.values()}
        return next(place for place in itertools.count() if place not in taken)

    def put(self, slot: int, request: SparseRequest | None) -> None:
        """Place a request in a slot, or none."""
        if request is None:
            self._requests.pop(slot, None)
        else:
            self._requests[slot] = request

    def take(self, slot: int) -> SparseRequest | None:
        """Remove and return a slot's request."""
        return self._requests.pop(slot, None)

    def sparse_rows(self, req_idx: np.ndarray | None, num_rows: int) -> dict[int, SparseRequest]:
        """Rows of a step whose request is not all dense, and their requests.

        Args:
            req_idx: ``[<= num_rows]`` slot of each row, or None.
            num_rows: rows in the step, padding included.
        """
        if not self._requests or self.dummy_step:
            return {}
        if not self.slots_in_metadata:
            return {row: request for row, request in self._requests.items() if row < num_rows}
        if req_idx is None:
            # Runner V2's speculators build metadata for their draft model, which stays dense.
            return {}
        rows = enumerate(req_idx.tolist())
        return {row: self._requests[slot] for row, slot in rows if slot in self._requests}

    def sparse_decodes(self, slots: np.ndarray) -> list[SparseRequest]:
        """Those of the requests in these slots that have a sparse decode method."""
        if not self._requests:
            return []
        requests = (self._requests.get(slot) for slot in slots.tolist())
        return [request for request in requests if request is not None and request.params.decode is not None]


# A singleton, because vLLM makes the logits processor that feeds it and the metadata builder that reads it without
# telling either of the other; it runs one model runner a process.
TABLE = RequestTable()
