"""What start-up compiles is all that chunks of later requests need, whatever their lengths.

Triton looks for a compiled kernel by what it specialises on. So no kernel is compiled or launched here: each launch is
noted as if on a Hopper GPU, over zeros.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from vllm_sparse.backend.warm_up import doubling
from vllm_sparse.keys import PlainKeys
from vllm_sparse.methods.base import Layer, PrefillMethod
from vllm_sparse.methods.registry import PREFILL_METHODS

triton = pytest.importorskip("triton")

HEAD_SIZE, BLOCK = 128, 128
# So that at start-up everything begins at multiples of 16 bytes, which Triton specialises on.
STEP, LONGEST = 2048, 16384
CHUNKS = 60


class Hopper:
    """What Triton asks its driver for before it launches."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> str:
        return "nowhere"

    def get_current_stream(self, device: str) -> None:
        return None


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> set[tuple[str, str]]:
    """Kernels with what they are specialised on."""
    found: set[tuple[str, str]] = set()

    def note(*, key: str, fn: Any, **_: object) -> bool:
        found.add((fn.name, key))
        # "Do not compile it", nor launch it.
        return True

    monkeypatch.setattr(triton.runtime.driver, "_active", Hopper())
    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", note)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda _: True))
    monkeypatch.setattr(torch, "empty", torch.zeros)
    return found


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (7, 1), (8, 2)])
@pytest.mark.parametrize("name", PREFILL_METHODS)
def test_no_chunk_waits_for_the_compiler(name: str, heads: int, kv_heads: int, launched: set[tuple[str, str]]) -> None:
    method: Any = PREFILL_METHODS[name]()
    assert isinstance(method, PrefillMethod)
    cache = torch.zeros(LONGEST // BLOCK, kv_heads, BLOCK, 2 * HEAD_SIZE, dtype=torch.bfloat16)
    table = torch.arange(cache.shape[0], dtype=torch.int32)

    def select(tokens: int, context_tokens: int) -> None:
        query = torch.zeros(tokens, heads, HEAD_SIZE, dtype=torch.bfloat16)
        keys = PlainKeys(cache, table[: -(-context_tokens // BLOCK)], context_tokens)
        method.select(query, keys, HEAD_SIZE**-0.5, BLOCK, Layer(method.dense_layers, 0))

    # As `PrefillWarmUp` does.
    for context_tokens in doubling(2 * STEP, LONGEST):
        for tokens in (STEP, STEP - 1, method.min_query_tokens):
            select(tokens, context_tokens if tokens == STEP else context_tokens - 1)
    at_start = set(launched)
    assert at_start
    for _ in range(CHUNKS):
        tokens = random.choice((STEP, random.randint(method.min_query_tokens, STEP)))
        context_tokens = random.randint(max(tokens, 2 * STEP), LONGEST)
        select(tokens, context_tokens)
        assert launched <= at_start, f"{tokens} of {context_tokens} tokens"
