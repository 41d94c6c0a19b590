"""One layer's sparse prompt chunks of several requests: together, as a server runs them, and one request at a time.

    python -m loadtest.benchmarks.kernels.chunks
    python -m loadtest.benchmarks.kernels.chunks --sizes 2048x8192 2048x16384 4096x32768 --methods dhsa sale

Keys and queries are random, the heads Qwen2.5-0.5B's by default: a small model, whose layers the host has little time
to launch. Of each method, and of all of them in turn (`mixed`): the host's time to launch a layer, the device's time
for it with the host ahead, both in milliseconds; the same summed over the chunks one by one; what the host takes once a
step; and the relative difference of the outputs, which is rounding.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch

from loadtest.benchmarks.engine.latency import Case
from loadtest.benchmarks.kernels.cache import executor_of, keys_of
from loadtest.benchmarks.kernels.costs import chunk_of, host_seconds
from loadtest.benchmarks.kernels.timing import median_seconds
from vllm_sparse.backend import prefill
from vllm_sparse.backend.layer import LayerCall, LayerPlatform
from vllm_sparse.keys import PagedKeys
from vllm_sparse.methods.prefill import PrefillMethod
from vllm_sparse.methods.registry import PREFILL_METHODS
from vllm_sparse.metrics import StepRecord, WorkerMetrics
from vllm_sparse.step.launch import Executor
from vllm_sparse.step.plan import PrefillRow, RowSpan, StepPlan

SIZES = ["2048x8192", "2048x16384", "4096x32768"]
METHODS = ["dhsa", "flexprefill", "sale", "hip", "streaming"]
HEADER = (
    "| method | host | device | one by one: host | device | step: host | difference |\n|---|---|---|---|---|---|---|"
)


class BenchmarkLayer(LayerPlatform):
    """A layer without a server.

    Args:
        heads: query heads, KV heads and their size.
        isa: packing of vLLM's CPU kernel, or None on CUDA.
    """

    first_query_head = 0
    logits_soft_cap = 0.0

    def __init__(self, heads: tuple[int, int, int], isa: str | None) -> None:
        self.num_heads, self.num_kv_heads, head_size = heads
        self.scale = head_size**-0.5
        self._isa = isa

    def make_executor(self, layer: Any) -> Executor:
        return executor_of(self._isa)

    def keys_of(self, layer: Any, kv_cache: torch.Tensor, block_table: torch.Tensor, seq_len: int) -> PagedKeys:
        return keys_of(self._isa, kv_cache, block_table, seq_len)

    def prefill_page_size(self, wanted_tokens: int, block_size_tokens: int) -> int:
        return min(wanted_tokens, block_size_tokens) if self._isa is None else block_size_tokens

    def decode_page_size(self, block_size_tokens: int) -> int:
        raise NotImplementedError

    def dense_subset(self, layer: Any, query: torch.Tensor, metadata: Any, spans: list[RowSpan]) -> Any:
        raise NotImplementedError

    def stock_forward(self, call: LayerCall, query: torch.Tensor, metadata: Any, output: torch.Tensor) -> None:
        raise NotImplementedError


def random_call(heads: tuple[int, int, int], sizes: Sequence[Case], block_size: int, seed: int) -> LayerCall:
    """Random queries of chunks, and their requests' keys and values on blocks in random order."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    generator = torch.Generator(device).manual_seed(seed)
    query_heads, kv_heads, head_size = heads
    width = max(-(-size.prompt_tokens // block_size) for size in sizes)
    blocks = len(sizes) * width
    table = torch.randperm(blocks, generator=generator, device=device).view(-1, width).int()
    cache = torch.randn(blocks, kv_heads, block_size, 2 * head_size, generator=generator, device=device).to(dtype)
    tokens = sum(size.requests for size in sizes)
    query = torch.randn(tokens, query_heads, head_size, generator=generator, device=device).to(dtype)
    metadata = SimpleNamespace(block_table=table)
    return LayerCall(None, 0, query, query, query, cache, metadata, torch.empty_like(query), head_size**-0.5)


def rows_of(methods: Sequence[PrefillMethod], sizes: Sequence[Case]) -> list[PrefillRow]:
    """The chunks, with the methods in turn."""
    starts = itertools.accumulate((size.requests for size in sizes), initial=0)
    return [
        PrefillRow(RowSpan(row, start, size.requests, size.prompt_tokens), method)
        for row, (start, size, method) in enumerate(zip(starts, sizes, itertools.cycle(methods), strict=False))
    ]


def line(name: str, platform: LayerPlatform, call: LayerCall, rows: Sequence[PrefillRow], repeats: int) -> str:
    """A line of the Markdown table."""
    record = StepRecord(
        WorkerMetrics(recording=False), StepPlan(range(1), tuple(row.span for row in rows), prefill=tuple(rows))
    )

    def planned(some: Sequence[PrefillRow]) -> list[prefill.ChunkLaunch]:
        return prefill.plan_launches(platform, call, some)

    together, alone = planned(rows), [planned([row]) for row in rows]

    def serve() -> None:
        prefill.serve_chunks(platform, call, together, record)

    def serve_alone() -> None:
        for launches in alone:
            prefill.serve_chunks(platform, call, launches, record)

    device = [median_seconds(one, repeats) for one in (serve, serve_alone)]
    serve()
    output = call.output.clone()
    serve_alone()
    difference = float((output.float() - call.output.float()).norm() / call.output.float().norm())
    host = [host_seconds(one, repeats) for one in (serve, serve_alone, lambda: planned(rows))]
    return (
        f"| {name} | {1e3 * host[0]:.3f} | {1e3 * device[0]:.3f} | {1e3 * host[1]:.3f} | {1e3 * device[1]:.3f} "
        f"| {1e3 * host[2]:.3f} | {difference:.1e} |"
    )


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = [chunk_of(size) for size in SIZES]
    parser.add_argument("--sizes", nargs="+", type=chunk_of, default=sizes, metavar="TOKENSxCONTEXT")
    parser.add_argument("--methods", nargs="+", choices=list(PREFILL_METHODS), default=METHODS)
    parser.add_argument("--query-heads", type=int, default=14)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--head-size", type=int, default=64)
    parser.add_argument("--block-size", type=int, default=128 if torch.cuda.is_available() else 32)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    heads = arguments.query_heads, arguments.kv_heads, arguments.head_size
    call = random_call(heads, arguments.sizes, arguments.block_size, arguments.seed)
    platform = BenchmarkLayer(heads, None if torch.cuda.is_available() else "vec")
    methods: dict[str, PrefillMethod] = {name: PREFILL_METHODS[name]() for name in arguments.methods}
    print(HEADER, flush=True)
    for name, turns in {**{name: [method] for name, method in methods.items()}, "mixed": [*methods.values()]}.items():
        print(line(name, platform, call, rows_of(turns, arguments.sizes), arguments.repeats), flush=True)


if __name__ == "__main__":
    main()
