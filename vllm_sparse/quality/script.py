"""Makes vLLM generate what a script says where it says something, and the model's own choice elsewhere.

Scripted tokens are decoded one by one like all others, so that a sparse decode method chooses for them and writes
their keys and values, which a prompt's tokens would leave to prefill. The log probabilities that vLLM returns are those
before the script, so their first rank is what the model itself would have said.

It does on model runner V1, which is the one of CPUs, what trace replay (`--enable-trace-replay`) does on V2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor

from vllm_sparse.quality.served_model import SCRIPT_KEY

if TYPE_CHECKING:
    import torch
    from vllm import SamplingParams


class ScriptProcessor(LogitsProcessor):
    """For `--logits-processors` of vLLM's model runner V1, without async scheduling; a request sends `SCRIPT_KEY`."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self._rows: dict[int, tuple[list[int], list[int]]] = {}

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Scripts come from this repository's own measurements."""

    def is_argmax_invariant(self) -> bool:
        """It decides what is largest."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Keep the script of each row, and the list in which vLLM collects the row's generated tokens."""
        if batch_update is None:
            return
        for index in batch_update.removed:
            self._rows.pop(index, None)
        for index, params, _, generated in batch_update.added:
            self._rows.pop(index, None)
            script = (params.extra_args or {}).get(SCRIPT_KEY)
            if script is not None:
                self._rows[index] = (script, generated)
        for source, target, direction in batch_update.moved:
            moved, displaced = self._rows.pop(source, None), self._rows.pop(target, None)
            if moved is not None:
                self._rows[target] = moved
            if displaced is not None and direction.name == "SWAP":
                self._rows[source] = displaced

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Leave one possible token in rows whose next token is scripted; logits are ``[rows, vocabulary]``."""
        for row, (script, generated) in self._rows.items():
            token = script[len(generated)] if len(generated) < len(script) else -1
            if token >= 0:
                logits[row] = float("-inf")
                logits[row, token] = 0
        return logits
