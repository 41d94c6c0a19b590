"""What the tests measure against: float64 attention, and paged caches written by each platform's own code.

A `Platform` is one way in which keys and values lie in the paged cache together with the executor that reads them. The
same oracle tests run over all platforms of the machine: vLLM's CPU kernel where vLLM is the CPU build, FlashAttention
on a GPU, and a plain cache without executor for what only selects.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from vllm_sparse.backend.executors.cpu import CpuExecutor
from vllm_sparse.backend.executors.lists import list_executor
from vllm_sparse.backend.executors.rule import FLASH_ATTENTION, TRITON, StockKernels
from vllm_sparse.keys import InterleavedPairKeys, PagedKeys, PlainKeys, TransposedKeys
from vllm_sparse.pages import PageList
from vllm_sparse.step.launch import Executor

NAN = float("nan")
# Stock kernels mask scores of stale slots but multiply stale values by a weight of 0, so stale values must be finite
# for them; a large one shows a weight that is not 0.
STALE_VALUE = 3.0e4

# Relative error of the stock kernels on random inputs, with a factor of about three to spare.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 1.5e-3, torch.bfloat16: 8e-3}


def relative_error(output: torch.Tensor, reference: torch.Tensor) -> float:
    """Norm of the difference over the norm of the reference; NaN anywhere gives NaN, which fails any comparison."""
    difference = output.double().cpu() - reference.double().cpu()
    return float(difference.norm() / reference.double().cpu().norm().clamp(min=1e-30))


def assert_close(output: torch.Tensor, reference: torch.Tensor, what: str = "output") -> None:
    """Relative norm within the tolerance of the output's dtype."""
    error = relative_error(output, reference)
    bound = TOLERANCE[output.dtype]
    assert error <= bound, f"{what}: relative error {error:.3g} exceeds {bound:.3g}"


def causal_mask(chunk: int, context: int) -> torch.Tensor:
    """Bool ``[chunk, context]``: keys that each of the last `chunk` positions may read."""
    positions = torch.arange(context - chunk, context)
    return torch.arange(context) <= positions.unsqueeze(1)


def attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, allowed: torch.Tensor
) -> torch.Tensor:
    """Masked softmax attention in float64.

    Args:
        query: ``[chunk, query_heads, head_size]``.
        keys: ``[kv_heads, context, head_size]``.
        values: likewise.
        scale: softmax scale.
        allowed: bool, broadcasts to ``[query_heads, chunk, context]``.

    Returns:
        float64 ``[chunk, query_heads, head_size]``.
    """
    return torch.einsum("hqk,hkd->qhd", probabilities(query, keys, scale, allowed), expand(values, query.shape[1]))


def probabilities(query: torch.Tensor, keys: torch.Tensor, scale: float, allowed: torch.Tensor) -> torch.Tensor:
    """Attention probabilities in float64: ``[query_heads, chunk, context]``; arguments as in `attention`."""
    heads = query.shape[1]
    scores = torch.einsum("qhd,hkd->hqk", query.double().cpu(), expand(keys, heads)) * scale
    return scores.masked_fill(~allowed, float("-inf")).softmax(-1)


def expand(keys: torch.Tensor, query_heads: int) -> torch.Tensor:
    """Keys or values of each query head, float64 on the CPU: ``[query_heads, context, head_size]``."""
    return keys.double().cpu().repeat_interleave(query_heads // keys.shape[0], dim=0)


def live_pages(lists: PageList, row: int) -> list[int]:
    """The live part of one row."""
    return [int(page) for page in lists.pages[row, : int(lists.kept_pages[row])].tolist()]


def kept_positions(lists: PageList, row: int, context: int) -> torch.Tensor:
    """Bool ``[context]``: token positions that a row may read."""
    pages = torch.tensor(live_pages(lists, row)).unsqueeze(1)
    positions = pages * lists.page_size_tokens + torch.arange(lists.page_size_tokens)
    kept = torch.zeros(context, dtype=torch.bool)
    kept[positions.flatten()[: int(lists.kept_tokens[row])]] = True
    return kept


@dataclass(frozen=True)
class Platform:
    """One way to hold and read the paged cache.

    Attributes:
        name: test id.
        device: where tensors live.
        dtype: of queries, keys and values.
        isa: packing of vLLM's CPU kernel, or None for the plain layout.
        executes: there is a stock kernel here for it.
        kernels: on a GPU, the stock kernels that execute.
    """

    name: str
    device: str
    dtype: torch.dtype
    isa: str | None
    executes: bool = True
    kernels: StockKernels = FLASH_ATTENTION[3]

    def executor(self) -> Executor:
        """The stock kernel."""
        return list_executor(self.kernels) if self.isa is None else CpuExecutor(self.isa, "auto")

    def keys_of(self, kv_cache: torch.Tensor, block_table: torch.Tensor, context: int) -> PagedKeys:
        """The adapter that reads this packing."""
        adapter: type[PagedKeys] = PlainKeys
        if self.isa is not None:
            adapter = InterleavedPairKeys if self.isa == "amx" else TransposedKeys
        return adapter(kv_cache, block_table, context)

    def page_sizes(self, block_size: int) -> list[int]:
        """Pages that the executor can read; the CPU kernel packs keys inside a block."""
        if self.isa is not None:
            return [block_size]
        return [size for size in (1, 16, 64, 128) if block_size % size == 0]

    def allows(self, block_size: int, head_size: int) -> bool:
        """Whether the packing exists for these sizes, as vLLM picks instruction sets."""
        if self.isa in ("vec", "amx"):
            return block_size % 32 == 0 and head_size % 32 == 0
        return True

    def write(self, kv_cache: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor) -> None:
        """Write ``[tokens, kv_heads, head_size]`` into slots, with vLLM's own code where the layout is packed."""
        blocks, kv_heads, block_size, double_head_size = kv_cache.shape
        if self.isa is None:
            head_size = double_head_size // 2
            kv_cache[slots // block_size, :, slots % block_size, :head_size] = keys
            kv_cache[slots // block_size, :, slots % block_size, head_size:] = values
            return
        from vllm import _custom_ops as ops

        packed = kv_cache.view(blocks, kv_heads, 2 * block_size, double_head_size // 2)
        key_cache, value_cache = packed.chunk(2, dim=2)
        ops.cpu_attn_reshape_and_cache(keys, values, key_cache, value_cache, slots, self.isa)


@dataclass(frozen=True)
class Paged:
    """Requests in one paged cache, with the keys and values that were written.

    Attributes:
        platform: how.
        kv_cache: ``[blocks, kv_heads, block_size, 2 * head_size]``; NaN where no request wrote.
        block_table: int32 ``[requests, blocks]``; entries past a request's pages name a poisoned block.
        keys: per request ``[kv_heads, context, head_size]``.
        values: likewise.
    """

    platform: Platform
    kv_cache: torch.Tensor
    block_table: torch.Tensor
    keys: list[torch.Tensor]
    values: list[torch.Tensor]

    @property
    def block_size(self) -> int:
        return self.kv_cache.shape[2]

    @property
    def num_kv_heads(self) -> int:
        return self.kv_cache.shape[1]

    def reader(self, request: int) -> PagedKeys:
        """Keys of a request as selection methods see them."""
        return self.platform.keys_of(self.kv_cache, self.block_table[request], self.keys[request].shape[1])


def paged(
    platform: Platform,
    keys: list[torch.Tensor],
    values: list[torch.Tensor],
    block_size: int,
    generator: torch.Generator,
) -> Paged:
    """Write requests into a fresh, poisoned cache, on physical blocks in random order.

    Stale slots of a request's last block hold NaN keys and large values.
    """
    kv_heads, _, head_size = keys[0].shape
    needed = [-(-request.shape[1] // block_size) for request in keys]
    total = sum(needed) + 3
    order = torch.randperm(total, generator=generator)
    cache = torch.full((total, kv_heads, block_size, 2 * head_size), NAN, dtype=platform.dtype, device=platform.device)
    table = torch.full((len(keys), max(needed) + 1), int(order[-1]), dtype=torch.int32)
    taken = 0
    for request, (request_keys, request_values) in enumerate(zip(keys, values, strict=True)):
        blocks = order[taken : taken + needed[request]]
        taken += needed[request]
        table[request, : needed[request]] = blocks.int()
        stale = needed[request] * block_size - request_keys.shape[1]
        padded_keys = torch.nn.functional.pad(request_keys, (0, 0, 0, stale), value=NAN)
        padded_values = torch.nn.functional.pad(request_values, (0, 0, 0, stale), value=STALE_VALUE)
        slots = (blocks.unsqueeze(1) * block_size + torch.arange(block_size)).flatten().long()
        platform.write(
            cache,
            padded_keys.transpose(0, 1).contiguous(),
            padded_values.transpose(0, 1).contiguous(),
            slots.to(platform.device),
        )
    return Paged(platform, cache, table.to(platform.device), keys, values)


def random_tensor(platform: Platform, generator: torch.Generator, *shape: int, spread: float = 1.0) -> torch.Tensor:
    """Normal numbers in the platform's dtype."""
    return (torch.randn(*shape, generator=generator) * spread).to(platform.dtype).to(platform.device)


def random_paged(
    platform: Platform, generator: torch.Generator, contexts: list[int], kv_heads: int, head_size: int, block_size: int
) -> Paged:
    """Requests of random keys and values."""
    keys = [random_tensor(platform, generator, kv_heads, context, head_size) for context in contexts]
    values = [random_tensor(platform, generator, kv_heads, context, head_size) for context in contexts]
    return paged(platform, keys, values, block_size, generator)


def has_cpu_kernel() -> bool:
    """Whether this vLLM is the CPU build. Loads its library for this processor."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return False
    # vLLM ships one library an instruction set and loads the right one; any other ends in "Illegal instruction".
    current_platform.import_kernels()
    return hasattr(torch.ops._C, "cpu_attention_with_kv_cache")


def packs(isa: str, dtype: torch.dtype) -> bool:
    """Whether the loaded CPU library writes keys in this packing: the one for AVX2 has none for AMX."""
    from vllm import _custom_ops as ops

    written = torch.zeros(1, 1, 64, 32, dtype=dtype)
    token = torch.ones(1, 1, 32, dtype=dtype)
    try:
        ops.cpu_attn_reshape_and_cache(token, token, *written.chunk(2, dim=2), torch.zeros(1, dtype=torch.long), isa)
    except RuntimeError:
        return False
    return True


def has_hopper() -> bool:
    """Whether FlashAttention 3 can run here."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


CPU_KERNEL = has_cpu_kernel()
needs_cpu_kernel = pytest.mark.skipif(not CPU_KERNEL, reason="vLLM is not the CPU build")


def needs_packing(isa: str, dtype: torch.dtype) -> pytest.MarkDecorator:
    """Skips, and says so, where the CPU library cannot write keys in a packing."""
    if not CPU_KERNEL:
        return needs_cpu_kernel
    reason = f"NOT TESTED: vLLM's library for this processor does not pack {str(dtype)[6:]} keys for {isa}"
    return pytest.mark.skipif(not packs(isa, dtype), reason=reason)


needs_cuda = pytest.mark.skipif(not has_hopper(), reason="no Hopper GPU")

PLAIN = Platform("plain-float32", "cpu", torch.float32, None, executes=False)
_EXECUTING = [
    (Platform("cpu-vec-float32", "cpu", torch.float32, "vec"), needs_cpu_kernel),
    (Platform("cpu-vec-bfloat16", "cpu", torch.bfloat16, "vec"), needs_cpu_kernel),
    (Platform("cpu-vec16-float16", "cpu", torch.float16, "vec16"), needs_cpu_kernel),
    (Platform("cpu-vec16-float32", "cpu", torch.float32, "vec16"), needs_cpu_kernel),
    (Platform("flash-bfloat16", "cuda", torch.bfloat16, None), needs_cuda),
    (Platform("flash-float16", "cuda", torch.float16, None), needs_cuda),
    (Platform("flash2-bfloat16", "cuda", torch.bfloat16, None, kernels=FLASH_ATTENTION[2]), needs_cuda),
    (Platform("triton-bfloat16", "cuda", torch.bfloat16, None, kernels=TRITON), needs_cuda),
]
EXECUTING = [pytest.param(platform, marks=mark, id=platform.name) for platform, mark in _EXECUTING]
# Selection needs no executor: the plain layout on every machine, on the device where there is one.
SELECTING = [
    pytest.param(PLAIN, id=PLAIN.name),
    pytest.param(Platform("plain-cuda-bfloat16", "cuda", torch.bfloat16, None), marks=needs_cuda, id="plain-cuda-bf16"),
]
# Where the library packs for AMX its keys can be written, though its attention cannot run without the hardware.
PACKED = [
    *SELECTING,
    *(
        pytest.param(
            Platform(f"cpu-{isa}", "cpu", dtype, isa), marks=needs_packing(isa, dtype), id=f"{isa}-{str(dtype)[6:]}"
        )
        for isa, dtype in (
            ("vec", torch.float32),
            ("vec", torch.bfloat16),
            ("vec16", torch.float16),
            ("vec16", torch.bfloat16),
            ("amx", torch.bfloat16),
        )
    ),
]
