"""Decoding in one layer: selection, attention, recall and error of every method beside the dense kernel.

    python -m loadtest.benchmarks.kernels.decode --batches 1 8 --lengths 32768 131072 --budgets 2048 4096
    python -m loadtest.benchmarks.kernels.decode --heads recorded --batches 4 --lengths 32768 --budgets 1024
    python -m loadtest.benchmarks.kernels.decode --methods blocktopk 'blocktopk={"candidate_factor": 4}'

* selection: the choice of all rows' lists; attention: the executor over them, with its floor, the bytes of the lists
  over the memory's speed (and a launch on a GPU), and how many floors it took.
* choosing layer: selection and what that layer reads, over the dense kernel's time.
* step: all layers of a model by the method's roles, beside as many dense ones.
* recall: share of the rows' true attention that the lists hold; error: relative, of the output. With recorded heads
  both are means over the layers that read a list, chosen in the layer that the method chooses it in; synthetic heads
  are one layer, which reads what it chose.

Rows are the last positions of one text, each a request. "copies" says how often the text lies in the cache: as often
as there are rows if they fit into the free memory, else rows take turns on fewer. With Llama-3.1-8B's heads 64 x 128K
take 34 GB, 64 x 512K 137 GB.

On CUDA all is timed inside a graph, unless `--eager` says otherwise for a selection that cannot be captured; methods
that can choose for all rows at once do so, as in the server's graphs, and their first step is not counted. On the CPU
selection runs request by request, as in the server; short lists stay in the CPU's caches and may be read faster than
the floor. Selection is the mean over consecutive steps, 32 in a graph and `--repeats` on the CPU, since a method may
search anew only in some of them. They are repeated, and where the first follows the last, `hip` searches anew, which
happens in no server.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from loadtest.benchmarks.kernels.batch import CACHE_SHARE, DecodeBatch, free_bytes, write_batch
from loadtest.benchmarks.kernels.heads import Heads, recorded_heads, synthetic_heads
from loadtest.benchmarks.kernels.prefill import BUNDLED_MODEL, prompt_tokens
from loadtest.benchmarks.kernels.timing import GRAPH_CALLS, graph_seconds, mean_seconds, median_seconds
from loadtest.benchmarks.kernels.truth import kept_mass
from vllm_sparse.kernels.page_summaries import store_summaries
from vllm_sparse.methods.decode import BatchDecodeMethod, DecodeMethod, LayerMemory
from vllm_sparse.methods.registry import DECODE_METHODS
from vllm_sparse.pages import PageList, concatenate
from vllm_sparse.step.launch import Launch
from vllm_sparse.step.roles import Role
from vllm_sparse.step.rows import DecodeRows, RowsPlace, ServerSize, TokenLists

# Copies of memory run at this speed on an H200; on other devices a copy is measured.
KNOWN_BYTES_PER_SECOND = {"NVIDIA H200": 4.3e12}
LAUNCH_SECONDS = 5e-6
COPIED_BYTES = 1 << 28

Selection = Callable[[], Launch]
"""One decode step's choice for all rows of a batch in one layer."""


@dataclass(frozen=True)
class Device:
    """Where the benchmark runs, and how it takes times.

    Attributes:
        name: of the GPU, or of the CPU.
        bytes_per_second: of its memory.
        launch_seconds: of an empty kernel.
        repeats: measured calls, or replays.
        graph: calls run inside a CUDA graph.
    """

    name: str
    bytes_per_second: float
    launch_seconds: float
    repeats: int
    graph: bool

    def seconds(self, call: Callable[[], object]) -> float:
        """Time of a call that always does the same."""
        return graph_seconds(call, self.repeats) if self.graph else median_seconds(call, self.repeats)

    def step_seconds(self, call: Callable[[], object]) -> float:
        """Time of a call that may do more in some steps than in others, mean over steps."""
        if self.graph:
            return graph_seconds(call, self.repeats)
        return mean_seconds(call, self.repeats)


@dataclass(frozen=True)
class MethodKnobs:
    """A method with knobs beside its budget.

    Attributes:
        name: in the registry.
        knobs: by their names.
        label: as it was given.
    """

    name: str
    knobs: Mapping[str, Any]
    label: str


def method_knobs(given: str) -> MethodKnobs:
    """A method of the command line: ``NAME`` or ``NAME={"knob": value}``.

    Raises:
        argparse.ArgumentTypeError: there is no such method, or its knobs are no JSON object of knobs that it has.
    """
    name, _, text = given.partition("=")
    try:
        knobs = json.loads(text or "{}")
        DECODE_METHODS[name](**knobs)
    except KeyError:
        raise argparse.ArgumentTypeError(f"{name!r} is no method; there are {', '.join(DECODE_METHODS)}") from None
    except (TypeError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"knobs of {name}, {text!r}: {error}") from None
    return MethodKnobs(name, knobs, given)


@dataclass(frozen=True)
class Measurement:
    """One line of the table; densities and shares of 1, times in seconds."""

    heads: str
    context: int
    batch: int
    copies: int
    method: str
    budget: int
    density: float
    selection_seconds: float
    attention_seconds: float
    floor_seconds: float
    dense_seconds: float
    roles: list[Role]
    recall: float
    error: float

    @property
    def choosing_seconds(self) -> float:
        """Of a layer that chooses: a selecting layer reads everything, another its list."""
        reads = self.attention_seconds if Role.WRITE_AND_READ in self.roles else self.dense_seconds
        return self.selection_seconds + reads

    @property
    def step_seconds(self) -> float:
        """Of all layers by their roles."""
        return step_seconds(self.roles, self.selection_seconds, self.attention_seconds, self.dense_seconds)

    @property
    def dense_step_seconds(self) -> float:
        """Of as many dense layers."""
        return self.dense_seconds * len(self.roles)


def step_seconds(roles: Sequence[Role], selection: float, attention: float, dense: float) -> float:
    """Time of all layers of a step.

    Args:
        roles: of the layers.
        selection: seconds of a choice.
        attention: seconds of attention over lists.
        dense: seconds of attention over everything.
    """
    by_role = {
        Role.DENSE: dense,
        Role.DENSE_AND_WRITE: selection + dense,
        Role.WRITE_AND_READ: selection + attention,
        Role.READ: attention,
    }
    return sum(by_role[role] for role in roles)


def selection_of(method: DecodeMethod, batch: DecodeBatch, steps: int = 1) -> Selection:
    """How a server chooses with a method for a batch on this device; the method keeps something from call to call.

    Args:
        method: the method.
        batch: the batch.
        steps: calls are so many steps that end with the batch's own contexts, over and over.
    """
    max_seq_len = max(batch.seq_lens)
    if batch.kv_cache.is_cuda and isinstance(method, BatchDecodeMethod) and method.serves(method, max_seq_len):
        return selection_at_once(method, batch, steps)
    return selection_by_request(method, batch, steps)


def selection_at_once(method: BatchDecodeMethod, batch: DecodeBatch, steps: int = 1) -> Selection:
    """All rows by one call, capturable; arguments as of `selection_of`. The requests' first step is done here."""
    device = batch.kv_cache.device
    kv_heads = batch.kv_cache.shape[1]
    query = batch.query.contiguous()
    contexts = [torch.tensor(step, dtype=torch.int32, device=device) for step in batch.contexts_of(steps)]
    knobs = torch.tensor([method.row_knobs()] * batch.rows, dtype=torch.int32, device=device)
    starts = contexts[-1].cumsum(0) - contexts[-1]
    slots = torch.arange(batch.rows, dtype=torch.int32, device=device)
    fresh = torch.ones_like(slots)
    summaries = None if method.summaries is None else batch.summaries(method.summaries)
    memory = method.allocate(ServerSize(batch.rows, max(batch.seq_lens), 1, kv_heads), device)
    lists = TokenLists(
        torch.zeros(batch.rows * kv_heads, method.longest_list_tokens, dtype=torch.int32, device=device),
        torch.zeros(batch.rows * kv_heads, dtype=torch.int32, device=device),
    )
    queries = torch.arange(batch.rows * kv_heads + 1, dtype=torch.int32, device=device)
    launch = Launch(queries, 1, lists.slots, lists.kept_tokens, 1)

    def choose_at(seq_lens: torch.Tensor) -> None:
        rows = DecodeRows(query, batch.kv_cache, batch.block_table, seq_lens, batch.heads.scale)
        place = RowsPlace(starts, sum(batch.seq_lens), slots, fresh, seq_lens, 0, summaries, memory)
        method.choose_rows(rows, knobs, place, lists)

    choose_at(contexts[-1])
    fresh.zero_()
    # In a graph each captured call keeps the step that it was captured with.
    step = itertools.cycle(contexts)

    def choose() -> Launch:
        choose_at(next(step))
        return launch

    return choose


def selection_by_request(method: DecodeMethod, batch: DecodeBatch, steps: int = 1) -> Selection:
    """Request by request, each with a memory that lives from call to call; arguments as of `selection_of`."""
    memories = [LayerMemory() for _ in range(batch.rows)]
    kind = method.summaries
    stored = batch.summaries(kind) if kind is not None else None
    step = itertools.cycle(batch.contexts_of(steps))

    def choose_for(row: int, context: int) -> PageList:
        keys = batch.keys(row, context)
        if kind is not None:
            keys.summaries = stored
            store_summaries(keys, kind, context - 1)
        return method.select(batch.query[row], keys, batch.heads.scale, batch.page_size_tokens, memories[row])

    def choose() -> Launch:
        return batch.launch(concatenate([choose_for(row, context) for row, context in enumerate(next(step))]))

    return choose


def quality(method: DecodeMethod, layers: list[DecodeBatch], roles: list[Role]) -> tuple[float, float, float]:
    """Density, recall and relative error, means over the layers that read a list.

    Args:
        method: the method.
        layers: of one text, with equal block tables.
        roles: of these layers.
    """
    found: list[tuple[float, float, float]] = []
    launch: Launch | None = None
    for batch, role in zip(layers, roles, strict=True):
        if role.writes_list:
            launch = selection_of(method, batch)()
        if role.reads_list:
            assert launch is not None
            dense = batch.dense()().float()
            error = (batch.attend(launch).float() - dense).norm() / dense.norm()
            in_reach = sum(batch.seq_lens) * len(launch.kept_tokens) // batch.rows
            found.append((float(launch.kept_tokens.sum()) / in_reach, kept_mass(batch, launch), float(error)))
    density, recall, error_share = (sum(column) / len(found) for column in zip(*found, strict=True))
    return density, recall, error_share


def measure(
    name: str,
    layers: list[DecodeBatch],
    methods: list[MethodKnobs],
    budgets: list[int],
    num_layers: int,
    device: Device,
) -> Iterator[Measurement]:
    """Every method at every budget.

    Args:
        name: of the heads.
        layers: all layers of a model, or one.
        methods: to measure.
        budgets: tokens.
        num_layers: of the step that is summed up.
        device: where this runs.
    """
    timed = layers[-1]
    element_bytes = timed.kv_cache.element_size()
    for budget in budgets:
        for entry in methods:
            base: Any = DECODE_METHODS[entry.name].with_budget(budget)
            method: DecodeMethod = replace(base, **entry.knobs)
            roles = method.layer_roles(num_layers)
            density, recall, error = quality(method, layers, roles if len(layers) > 1 else [Role.WRITE_AND_READ])
            launch = selection_of(method, timed)()
            list_bytes = float(launch.kept_tokens.sum()) * timed.kv_cache.shape[3] * element_bytes
            yield Measurement(
                name,
                timed.heads.context,
                timed.rows,
                timed.copies,
                entry.label,
                budget,
                density,
                device.step_seconds(selection_of(method, timed, GRAPH_CALLS)),
                device.seconds(functools.partial(timed.attend, launch)),
                list_bytes / device.bytes_per_second + device.launch_seconds,
                # Beside each method again: a card's clock falls while it works.
                device.seconds(timed.dense()),
                roles,
                recall,
                error,
            )


HEADER = (
    "| heads | context | batch | copies | method | budget | density | selection ms | attention ms | floor ms | floors "
    "| dense ms | choosing layer | step ms | dense step ms | speed-up | recall | error |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|"
)


def line(m: Measurement) -> str:
    """A line of the Markdown table."""
    return (
        f"| {m.heads} | {m.context} | {m.batch} | {m.copies} | {m.method} | {m.budget} | {m.density:.3f} "
        f"| {m.selection_seconds * 1e3:.4f} | {m.attention_seconds * 1e3:.4f} | {m.floor_seconds * 1e3:.4f} "
        f"| {m.attention_seconds / m.floor_seconds:.2f} | {m.dense_seconds * 1e3:.4f} "
        f"| {m.choosing_seconds / m.dense_seconds:.2f}x | {m.step_seconds * 1e3:.3f} "
        f"| {m.dense_step_seconds * 1e3:.3f} | {m.dense_step_seconds / m.step_seconds:.2f}x | {m.recall:.4f} "
        f"| {m.error:.4f} |"
    )


def this_device(repeats: int, eager: bool) -> Device:
    """The device that the benchmark runs on, its memory's speed known or measured by a copy."""
    cuda = torch.cuda.is_available()
    name = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    speed = KNOWN_BYTES_PER_SECOND.get(name)
    if speed is None:
        source = torch.ones(COPIED_BYTES, dtype=torch.uint8, device="cuda" if cuda else "cpu")
        target = torch.empty_like(source)
        # Read and written.
        speed = 2 * COPIED_BYTES / median_seconds(lambda: target.copy_(source), 5)
    return Device(name, speed, LAUNCH_SECONDS if cuda else 0.0, repeats, cuda and not eager)


def texts_of(arguments: argparse.Namespace, length: int) -> Iterator[tuple[str, list[Heads]]]:
    """Heads to measure, by name: all layers of a model, or one synthetic layer."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    queries = max(arguments.batches)
    if arguments.heads == "recorded":
        from transformers import AutoConfig

        layers = AutoConfig.from_pretrained(arguments.model).get_text_config().num_hidden_layers
        tokens = prompt_tokens(length, arguments.seed)
        yield "recorded", recorded_heads(arguments.model, tokens, queries, list(range(layers)))
        return
    for concentration in arguments.concentrations:
        generator = torch.Generator(device).manual_seed(arguments.seed)
        sizes = (queries, length, arguments.query_heads, arguments.kv_heads, arguments.head_size)
        yield f"synthetic {concentration:g}", [synthetic_heads(generator, *sizes, concentration, torch.bfloat16)]


def run(arguments: argparse.Namespace) -> None:
    """Print the table line by line."""
    device = this_device(arguments.repeats, arguments.eager)
    block_size = arguments.block_size or (128 if torch.cuda.is_available() else 32)
    print(f"{device.name}; memory {device.bytes_per_second / 1e12:.3g} TB/s; {'graphs' if device.graph else 'eager'}")
    print(HEADER, flush=True)
    for length in arguments.lengths:
        for name, texts in texts_of(arguments, length):
            num_layers = len(texts) if len(texts) > 1 else arguments.layers
            for rows in arguments.batches:
                room = int(free_bytes(texts[0].keys.device) * CACHE_SHARE) // len(texts)
                layers = [write_batch(heads, rows, block_size, room, arguments.seed) for heads in texts]
                for one in measure(name, layers, arguments.methods, arguments.budgets, num_layers, device):
                    print(line(one), flush=True)
                del layers


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("--heads", choices=["synthetic", "recorded"], default="synthetic")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 64], help="requests of a step")
    parser.add_argument("--lengths", type=int, nargs="+", default=[32768, 131072, 524288], help="tokens of context")
    parser.add_argument("--budgets", type=int, nargs="+", default=[2048, 4096], help="tokens that a layer reads")
    parser.add_argument(
        "--methods",
        nargs="+",
        type=method_knobs,
        default=[method_knobs(name) for name in DECODE_METHODS],
        metavar="METHOD",
        help=f"of {', '.join(DECODE_METHODS)}; knobs follow as JSON: 'blocktopk={{\"candidate_factor\": 4}}'",
    )
    parser.add_argument("--concentrations", type=float, nargs="+", default=[8.0], help="of synthetic heads")
    parser.add_argument("--query-heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-size", type=int, default=128)
    parser.add_argument("--layers", type=int, default=32, help="of a step with synthetic heads")
    parser.add_argument("--model", default=str(BUNDLED_MODEL), help="model to record heads of")
    parser.add_argument("--block-size", type=int, help="tokens of a KV-cache block; default: the backend's")
    parser.add_argument("--repeats", type=int, default=16, help="measured calls, or replays of a graph of 32 calls")
    parser.add_argument("--eager", action="store_true", help="on CUDA: no graphs")
    parser.add_argument("--seed", type=int, default=0)


def main(argv: list[str] | None = None) -> Any:
    """Command line of `python -m loadtest.benchmarks.kernels.decode`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    arguments = parser.parse_args(argv)
    shortest = min(arguments.lengths) - max(arguments.batches) - (GRAPH_CALLS - 1)
    if max(arguments.budgets) > shortest:
        parser.error(
            f"--budgets {max(arguments.budgets)}: the shortest row begins with {shortest + 1} tokens, and a budget of "
            f"all of them runs dense; at most {shortest} are allowed"
        )
    run(arguments)


if __name__ == "__main__":
    main()
