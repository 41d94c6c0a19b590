"""vLLM's `GPUModelRunner` (runner V1): it says which requests come back after they were preempted.

Logits processors see that a request leaves the batch and enters it again, and not why: for a step that does not
schedule it, after which it goes on as it was, or because its blocks were taken. Not needed any more once they are told.
"""

from __future__ import annotations

from typing import Any

from vllm_sparse.hooks.wrapping import is_wrapped, wraps
from vllm_sparse.step.requests import TABLE


def install() -> None:
    """Wrap `_update_states`, which puts a step's requests into the batch; idempotent."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    update = GPUModelRunner._update_states
    if is_wrapped(update):
        return

    @wraps(update)
    def update_states(self: Any, scheduler_output: Any) -> Any:
        for request in scheduler_output.scheduled_cached_reqs.resumed_req_ids:
            TABLE.forget(self.requests[request].sampling_params)
        return update(self, scheduler_output)

    GPUModelRunner._update_states = update_states
