"""vLLM's logits processors: the one way in which both model runners hand sampling parameters to a plugin.

Runner V2 makes them on all stages of a pipeline and hands parameters to those of the last one; `gpu_model_runner` does
it on the others.

Not needed any more once vLLM passes a request's extras to the attention metadata builder.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor

from vllm_sparse.step.requests import TABLE

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.sampling_params import SamplingParams


class SparseParamsProcessor(LogitsProcessor):
    """Feeds `TABLE`; leaves logits alone. One class for both runners, whose constructors and hooks differ."""

    def __init__(self, vllm_config: VllmConfig, state_or_device: Any, is_pin_memory: bool | None = None) -> None:
        self._requests = state_or_device if is_pin_memory is None else None
        TABLE.attach(slots_in_metadata=is_pin_memory is None)
        # Imported here: the worker's class, and the platform, are not to be chosen while plugins are loaded.
        from vllm.platforms import current_platform

        if current_platform.is_cuda():
            from vllm_sparse.hooks import gpu_worker

            gpu_worker.install()
        if is_pin_memory is None:
            # Imported here: only runner V2 has these classes' graphs.
            from vllm_sparse.hooks import gpu_model_runner, model_cuda_graph_manager

            gpu_model_runner.install()
            model_cuda_graph_manager.install()
        else:
            from vllm_sparse.hooks import gpu_model_runner_v1

            gpu_model_runner_v1.install()

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Nothing to do: `vllm_sparse.server.admission` checks requests where it can still answer HTTP 400."""

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """Runner V2. False: this processor modifies no logits, so the fast path stays."""
        prompt_tokens = None if self._requests is None else int(self._requests.prompt_len.np[req_idx])
        TABLE.set(req_idx, sampling_params, prompt_tokens)
        return False

    def update_state(self, batch_update: Any) -> None:
        """Runner V1: removals, additions and moves, in the order that its interface prescribes."""
        if batch_update is None:
            return
        for index in batch_update.removed:
            TABLE.take(index)
        for index, sampling_params, prompt, _ in batch_update.added:
            TABLE.set_again(index, sampling_params, None if prompt is None else len(prompt))
        for source, target, direction in batch_update.moved:
            moved = TABLE.take(source)
            displaced = TABLE.take(target)
            TABLE.put(target, moved)
            if direction.name == "SWAP":
                TABLE.put(source, displaced)

    def is_argmax_invariant(self) -> bool:
        """Runner V1."""
        return True

    def apply(self, logits: torch.Tensor, ctx: Any = None) -> torch.Tensor:
        """Return the logits as they are."""
        return logits
