"""Triton kernels compile for GPUs on which this package has not run, as far as Triton can tell without one.

What methods launch is noted as if on that GPU, and then compiled for it, to its machine code. Tiles have to fit the
shared memory that a program may have there; compute capabilities 8.6 and 8.9 have the least.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from tests.kernels.interpreter import CAN_RUN, DEVICE
from tests.kernels.launches import (
    BLOCK_TOKENS,
    DecodeRoom,
    Noted,
    Target,
    choose_for_chunks,
    note_launches,
    served_at_once,
)
from vllm_sparse.backend.decode_buffers import DecodeBuffers
from vllm_sparse.methods.dhsa import Dhsa
from vllm_sparse.methods.prefill import PrefillMethod
from vllm_sparse.methods.registry import DECODE_METHODS, PREFILL_METHODS
from vllm_sparse.step.plan import layer_roles
from vllm_sparse.step.requests import RowSetting
from vllm_sparse.step.rows import ServerSize

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(CAN_RUN and DEVICE == "cpu", reason="Triton only interprets in this process")

HEADS, KV_HEADS = 8, 2
QUERY_TOKENS, SEQ_LEN, ROWS, LAYERS = 512, 4096, 8, 4

SM80 = Target("cuda", 80, 163 * 1024)
# And of 8.6, whose code is the same for Triton.
SM89 = Target("cuda", 89, 99 * 1024)
SM100 = Target("cuda", 100, 227 * 1024)
GFX942 = Target("hip", "gfx942", 64 * 1024)


def noted(
    monkeypatch: pytest.MonkeyPatch, target: Target, cache_dtype: torch.dtype, head_size: int = 128
) -> list[Noted]:
    """What all methods with their defaults launch, each kernel once for each set of constants."""
    with monkeypatch.context() as patch:
        found = note_launches(patch, target)
        cache = torch.zeros(SEQ_LEN // BLOCK_TOKENS, KV_HEADS, BLOCK_TOKENS, 2 * head_size).to(cache_dtype)
        query = torch.zeros(QUERY_TOKENS, HEADS, head_size, dtype=torch.bfloat16)
        chunks: list[Any] = [made() for made in PREFILL_METHODS.values()]
        for method in (*chunks, Dhsa(density=0.2), Dhsa(density=0.2, key_blocks="adaptive", bound_weight=0.0)):
            assert isinstance(method, PrefillMethod)
            choose_for_chunks(method, query, cache, [(QUERY_TOKENS, SEQ_LEN)])
        decoding = served_at_once([method() for method in DECODE_METHODS.values()])
        size = ServerSize(ROWS, SEQ_LEN, LAYERS, KV_HEADS)
        buffers = DecodeBuffers(ROWS, size, decoding, 4352, torch.device("cpu"))
        contexts = torch.full((ROWS,), SEQ_LEN, dtype=torch.int32)
        table = torch.zeros(ROWS, SEQ_LEN // BLOCK_TOKENS, dtype=torch.int32)
        room = DecodeRoom(buffers, cache, HEADS, query.dtype, contexts, table)
        rows = [RowSetting(one, 0, layer_roles(one, LAYERS), slot, False) for slot, one in enumerate(decoding)]
        room.serve(buffers.launches(rows, all_sparse=False), slice(0, ROWS), ROWS * SEQ_LEN)
    return list({(one.kernel, repr(one.constants), repr(one.signature)): one for one in found.values()}.values())


# Wide heads where shared memory is least, which narrower ones then fit, too.
@pytest.mark.parametrize(
    ("target", "head_size"),
    [(SM80, 128), (SM89, 256), (SM100, 128), (GFX942, 128)],
    ids=lambda value: getattr(value, "name", value),
)
def test_kernels_compile(target: Target, head_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = noted(monkeypatch, target, torch.bfloat16, head_size)
    assert len({one.kernel.__name__ for one in kernels}) > 25
    if target is not SM89:
        # With one set of constants each, which takes half the time.
        kernels = list({one.kernel: one for one in kernels}.values())
    for one in kernels:
        shared_bytes = one.compile(target).metadata.shared
        room = target.shared_memory_bytes
        assert shared_bytes <= room, f"{one.kernel.__name__} needs {shared_bytes} of {room} bytes of shared memory"


def test_the_clock_compiles_for_amd() -> None:
    """And is waited for by the counter that the instruction raises."""
    from triton import compile as compile_kernel
    from triton.compiler import ASTSource

    from vllm_sparse.kernels.device_clock.triton import stamp_kernel

    source = ASTSource(stamp_kernel, {"time_pointer": "*i64", "CLOCK": "constexpr"}, {(1,): "gfx9"})
    compiled = compile_kernel(source, target=GFX942.triton, options={"num_warps": 1})
    assert re.search(r"s_memrealtime s\[\d+:\d+\]\s+s_waitcnt lgkmcnt\(0\)", compiled.asm["amdgcn"])


def test_kernels_that_read_an_fp8_cache_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute capability 8.9 has the least shared memory of those that have FP8."""
    kernels = noted(monkeypatch, SM89, torch.float8_e4m3fn)
    reading = [one for one in kernels if "*fp8e4nv" in one.signature.values()]
    assert len({one.kernel.__name__ for one in reading}) > 8
    for one in reading:
        assert one.compile(SM89).metadata.shared <= SM89.shared_memory_bytes, one.kernel.__name__
