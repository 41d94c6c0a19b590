"""vLLM's `GPUModelRunner` (runner V2): it keeps a sparse step that no graph holds out of FULL CUDA graphs.

A batch is eligible for a FULL decode graph when its rows have a uniform token count. Where no graph was captured for a
sparse step, none is reported: that makes it a mixed batch, for which PIECEWISE graphs run with the attention between
them; data-parallel ranks agree on that value, so all of them follow. Not needed any more once vLLM asks the metadata
builder, step by step, whether a FULL graph may run.

On the stages of a pipeline before the last one it also hands sampling parameters on, as samplers do on the last one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm_sparse.backend.decode_graphs import current_graphs
from vllm_sparse.hooks.wrapping import is_wrapped, wraps
from vllm_sparse.step.requests import TABLE

if TYPE_CHECKING:
    import numpy as np


def install() -> None:
    """Wrap `gather_batch_req_state`, which sees a step before its graph is chosen, and `add_requests`."""
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    gather = GPUModelRunner.gather_batch_req_state
    if is_wrapped(gather):
        return

    @wraps(gather)
    def gather_batch_req_state(self: Any, scheduler_output: Any, dummy_run: bool) -> tuple[Any, int | None]:
        batch, uniform_tokens = gather(self, scheduler_output, dummy_run)
        TABLE.dummy_step = dummy_run
        graphs = current_graphs()
        if graphs is not None:
            graphs.step, graphs.may_replay = None, False
        if batch is not None and uniform_tokens is not None and not graphs_hold(batch.idx_mapping_np):
            uniform_tokens = None
        has_graphs = graphs is not None and bool(graphs.sizes)
        TABLE.full_graph = has_graphs and batch is not None and uniform_tokens is not None
        return batch, uniform_tokens

    add = GPUModelRunner.add_requests

    @wraps(add)
    def add_requests(self: Any, scheduler_output: Any) -> None:
        add(self, scheduler_output)
        if self.is_last_pp_rank:
            return
        for new in scheduler_output.scheduled_new_reqs:
            if new.sampling_params is not None:
                TABLE.set(self.req_states.req_id_to_index[new.req_id], new.sampling_params, new.prompt_len)

    GPUModelRunner.gather_batch_req_state, GPUModelRunner.add_requests = gather_batch_req_state, add_requests


def graphs_hold(slots: np.ndarray) -> bool:
    """Whether a step of the requests in these slots may replay a FULL graph, which then is chosen for sparse rows."""
    # Those of which no graph holds a row, and which is dense, do not matter.
    requests = [request for request in TABLE.sparse_decodes(slots) if request.leaves_graphs]
    graphs = current_graphs()
    if not requests:
        return True
    if graphs is None or not graphs.holds(requests, len(slots)):
        return False
    # Graphs summarise the newest block alone, not those that a request found in the prefix cache or filled while it was
    # dense.
    if any(request.summaries is not None and request.catches_up for request in requests):
        return False
    graphs.may_replay = True
    return True
