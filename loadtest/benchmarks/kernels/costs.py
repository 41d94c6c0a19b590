"""What sparse attention was predicted to gain, beside what it gains on this GPU: one layer, a handful of cells.

    python -m loadtest.benchmarks.kernels.costs
    python -m loadtest.benchmarks.kernels.costs --cells 1x32768 --methods tidal 'blocktopk={"budget_tokens": 4096}'

About two minutes on an H200, Llama-3.1-8B's heads by default. Predictions are those by which a server decides what runs
dense (`vllm_sparse.step.costs`), with the numbers of `vllm_sparse.step.gpu_table` for this GPU, which is also where
to correct them:

* Decoding, a step of `--layers` layers in which all rows are sparse: what it gains over a dense one, by the layers'
  measured times (`loadtest.benchmarks.kernels.decode`) and as predicted; the verdict; and the layer's times, from which
  rates and launches follow: dense microseconds of two lengths give `dense_bytes_per_second`, attention of two batches
  `list_bytes_per_second`, selection of two lengths `scored_bytes_per_second` and a method's `launches_us`.
* Prompt chunks, one layer: choosing and attending, and dense attention, measured and predicted; and how long the host
  takes to launch what a sparse chunk needs, which is `host_us`.

"wrong" marks a verdict of sparse where the layers say that it is slower: such a cell breaks the promise. "late" marks
one of dense that would have gained more than `margin_us`, or with a prompt chunk more than `host_us`. Steps in the
whole engine: `loadtest.benchmarks.engine.latency`.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from loadtest.benchmarks.engine.latency import Case
from loadtest.benchmarks.kernels.batch import CACHE_SHARE, DecodeBatch, free_bytes, write_batch
from loadtest.benchmarks.kernels.cache import Cache, write_cache
from loadtest.benchmarks.kernels.decode import (
    Device,
    MethodKnobs,
    method_knobs,
    selection_of,
    step_seconds,
    this_device,
)
from loadtest.benchmarks.kernels.heads import Heads, synthetic_heads
from loadtest.benchmarks.kernels.prefill import selector
from loadtest.benchmarks.kernels.timing import GRAPH_CALLS, median_seconds
from vllm_sparse.backend.prefill import PromptChunk, attend_prompt_chunk
from vllm_sparse.methods.decode import DecodeMethod
from vllm_sparse.methods.prefill import PrefillMethod
from vllm_sparse.methods.registry import DECODE_METHODS, PREFILL_METHODS
from vllm_sparse.step.costs import MICROSECOND, AttentionShape, StepCosts
from vllm_sparse.step.gpu_table import costs_of

CELLS = ["1x8192", "1x32768", "1x131072", "8x131072", "24x32768", "64x4096", "64x8192"]
DECODING = ["tidal", "hip", "blocktopk"]
CHUNKS = ["8192x8192", "8192x32768", "512x32768", "8192x131072"]
PROMPTS = ["dhsa", "flexprefill", "sale"]
CONCENTRATION = 8.0


@dataclass(frozen=True)
class StepGain:
    """A decode step, measured and predicted; seconds.

    Attributes:
        measured: what the step gains over a dense one, by its layers' times.
        predicted: the same by the costs, without doubt and margin.
        is_sparse: the verdict.
        dense: of one layer.
        attention: of one layer over lists.
        selection: of one layer.
    """

    measured: float
    predicted: float
    is_sparse: bool
    dense: float
    attention: float
    selection: float


def step_gain(method: DecodeMethod, batch: DecodeBatch, device: Device, costs: StepCosts) -> StepGain:
    """A step of a batch whose rows all decode by one method.

    Args:
        method: of the rows.
        batch: the rows.
        device: where this runs.
        costs: by which steps are decided.
    """
    roles = tuple(method.layer_roles(costs.shape.num_layers))
    launch = selection_of(method, batch)()
    attention = device.seconds(functools.partial(batch.attend, launch))
    selection = device.step_seconds(selection_of(method, batch, GRAPH_CALLS))
    dense = device.seconds(batch.dense())
    measured = len(roles) * dense - step_seconds(roles, selection, attention, dense)
    decided = StepCosts(costs.gpu, costs.shape, [method])
    plain = StepCosts(costs.gpu.as_predicted, costs.shape, [method])
    gains, predicted = (
        sum(one.row_gain(method, roles).at(seq_len) for seq_len in batch.seq_lens) for one in (decided, plain)
    )
    predicted -= plain.launch_seconds([method.name], all_sparse=True, full_graph=True)
    methods, _ = decided.sparse_methods({method.name: gains}, (), all_sparse=True, full_graph=True)
    return StepGain(measured, predicted, bool(methods), dense, attention, selection)


def judged(is_sparse: bool, gained: float, margin: float) -> str:
    """A verdict in words, beside what was measured."""
    remark = ", wrong" if is_sparse and gained < 0 else ", late" if not is_sparse and gained > margin else ""
    return ("sparse" if is_sparse else "dense") + remark


def host_seconds(call: Callable[[], object], repeats: int) -> float:
    """Time that the host takes for a call, which the device may go on with afterwards; the least of some."""
    times = []
    for _ in range(repeats):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return min(times)


def serving(method: PrefillMethod, cache: Cache, chunk: PromptChunk) -> Callable[[], None]:
    """Chooses and attends, as a layer does with a prompt chunk; what a step prepares is prepared."""
    select = selector(method, cache)
    return lambda: attend_prompt_chunk(cache.executor, method, select(), chunk)


def decode_lines(arguments: argparse.Namespace, costs: StepCosts) -> Iterator[str]:
    """The table of decode steps, line by line."""
    yield (
        "| requests | context | method | gained ms | predicted | verdict | dense us | attention us | selection us |\n"
        "|---|---|---|---|---|---|---|---|---|"
    )
    device = this_device(arguments.repeats, eager=False)
    for cell in arguments.cells:
        heads = heads_of(arguments, cell.requests, cell.prompt_tokens)
        room = int(free_bytes(heads.keys.device) * CACHE_SHARE)
        batch = write_batch(heads, cell.requests, arguments.block_size, room, arguments.seed)
        for entry in arguments.methods:
            method: Any = DECODE_METHODS[entry.name](**entry.knobs)
            if method.budget_tokens >= min(batch.seq_lens) - GRAPH_CALLS:
                continue
            found = step_gain(method, batch, device, costs)
            verdict = judged(found.is_sparse, found.measured, costs.margin_seconds)
            layer = " | ".join(f"{1e6 * seconds:.1f}" for seconds in (found.dense, found.attention, found.selection))
            yield (
                f"| {cell.requests} | {cell.prompt_tokens} | {entry.label} | {1e3 * found.measured:.2f} "
                f"| {1e3 * found.predicted:.2f} | {verdict} | {layer} |"
            )


def chunk_lines(arguments: argparse.Namespace, costs: StepCosts) -> Iterator[str]:
    """The table of prompt chunks, line by line."""
    yield (
        "| chunk | context | method | sparse ms | predicted | dense ms | predicted | verdict | host ms |\n"
        "|---|---|---|---|---|---|---|---|---|"
    )
    for cell in arguments.chunks:
        query_tokens, seq_len = cell.requests, cell.prompt_tokens
        heads = heads_of(arguments, query_tokens, seq_len)
        generator = torch.Generator(heads.keys.device).manual_seed(arguments.seed)
        cache = write_cache(heads, arguments.block_size, generator)
        chunk = PromptChunk(heads.query, torch.empty_like(heads.query), cache.kv_cache, cache.block_table, heads.scale)
        dense = median_seconds(cache.dense, arguments.repeats)
        for name in arguments.prompt_methods:
            method: PrefillMethod = PREFILL_METHODS[name]()
            serve = serving(method, cache, chunk)
            sparse = median_seconds(serve, arguments.repeats)
            pays = costs.chunk_cost(method, query_tokens, seq_len) < 1
            yield (
                f"| {query_tokens} | {seq_len} | {name} | {1e3 * sparse:.3f} "
                f"| {1e3 * costs.chunk_seconds(method, query_tokens, seq_len):.3f} | {1e3 * dense:.3f} "
                f"| {1e3 * costs.dense_chunk_seconds(query_tokens, seq_len):.3f} "
                f"| {judged(pays, dense - sparse, costs.gpu.selection_of(name).host_us * MICROSECOND)} "
                f"| {1e3 * host_seconds(serve, arguments.repeats):.3f} |"
            )


def heads_of(arguments: argparse.Namespace, queries: int, context: int) -> Heads:
    """Heads of a text of so many tokens, with its last queries."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(arguments.seed)
    sizes = (queries, context, arguments.query_heads, arguments.kv_heads, arguments.head_size)
    return synthetic_heads(generator, *sizes, CONCENTRATION, torch.bfloat16)


def chunk_of(text: str) -> Case:
    """A prompt chunk from ``TOKENSxCONTEXT``.

    Raises:
        argparse.ArgumentTypeError: it is something else, or the chunk is longer than the context.
    """
    cell = Case.parse(text)
    if "x" not in text or cell.requests > cell.prompt_tokens:
        raise argparse.ArgumentTypeError(f"{text!r} is no TOKENSxCONTEXT with a chunk within the context, as 512x8192")
    return cell


def cells_of(names: list[str], parse: Callable[[str], Any]) -> list[Any]:
    """Defaults of the command line."""
    return [parse(name) for name in names]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    cells, chunks = cells_of(CELLS, Case.parse), cells_of(CHUNKS, chunk_of)
    methods: list[MethodKnobs] = cells_of(DECODING, method_knobs)
    parser.add_argument("--cells", nargs="*", type=Case.parse, default=cells, metavar="REQUESTSxTOKENS")
    parser.add_argument("--methods", nargs="+", type=method_knobs, default=methods, metavar="METHOD")
    parser.add_argument("--chunks", nargs="*", type=chunk_of, default=chunks, metavar="TOKENSxCONTEXT")
    parser.add_argument("--prompt-methods", nargs="+", choices=list(PREFILL_METHODS), default=PROMPTS)
    parser.add_argument("--query-heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-size", type=int, default=128)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--linear-gflop", type=float, default=0.436, help="of a token in a layer's linear layers")
    parser.add_argument("--block-size", type=int, default=128 if torch.cuda.is_available() else 32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)


def main(argv: list[str] | None = None) -> Any:
    """Command line of `python -m loadtest.benchmarks.kernels.costs`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    arguments = parser.parse_args(argv)
    gpu = costs_of(torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU")
    token_bytes = 2 * arguments.kv_heads * arguments.head_size * torch.bfloat16.itemsize
    shape = AttentionShape(
        arguments.layers,
        arguments.query_heads,
        arguments.kv_heads,
        arguments.head_size,
        token_bytes,
        arguments.linear_gflop * 1e9,
    )
    costs = StepCosts(gpu, shape, [])
    numbers = dataclasses.replace(gpu, choosing={}, selection={})
    print(f"{numbers}\n", flush=True)
    for lines in (decode_lines(arguments, costs), chunk_lines(arguments, costs)):
        for line in lines:
            print(line, flush=True)
        print()


if __name__ == "__main__":
    main()
