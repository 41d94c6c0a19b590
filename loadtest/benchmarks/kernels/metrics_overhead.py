"""What the metrics cost a decode step: time of their calls and in its CUDA graph, beside the step of a whole engine.

    python -m loadtest.benchmarks.kernels.metrics_overhead --rows 1 8

The calls are those of `vllm_sparse.backend` in a step of so many requests, on the model's own geometry, writing to
prometheus_client's multi-process files as a worker does. What is sampled counts by its share of the steps, at the
server's default intervals. On a GPU, rows that are served at once are those of a CUDA graph, in which every step takes
stamps and copies a row: that is device time.

The step is that of `vllm.LLM`, as it is and, by turns, with the calls left out. "Share" is all of it as if nothing were
hidden behind the device's work; "longer by" is what the step really takes longer for the calls, the median of pairs of
generations and its 95 % interval, to which the graph's part has to be added.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from loadtest.benchmarks.kernels.timing import graph_seconds, mean_seconds
from loadtest.load.report.statistics import interval_of_median
from loadtest.load.report.words import interval_in_words
from loadtest.offline import engine
from vllm_sparse.backend.decode_batch import DecodeStep
from vllm_sparse.backend.decode_buffers import DecodeBuffers
from vllm_sparse.config.settings import ServerConfig
from vllm_sparse.keys import PlainKeys
from vllm_sparse.methods.tidal import Tidal
from vllm_sparse.metrics import Geometry, Sampling, StepRecord, WorkerMetrics
from vllm_sparse.metrics.directory import write_to_announced_directory
from vllm_sparse.metrics.graph_timing import GraphTimer
from vllm_sparse.metrics.memory import MemoryMetrics
from vllm_sparse.metrics.recall import attention_recall
from vllm_sparse.metrics.row_recall import GraphRecall, TakenRow
from vllm_sparse.metrics.timing import ASIDE, ATTENTION, SELECTION, StepTimer
from vllm_sparse.pages import PageList
from vllm_sparse.step.plan import BatchRow, DecodeRow, RowSpan, StepPlan, layer_roles
from vllm_sparse.step.requests import RowSetting
from vllm_sparse.step.roles import reading_layers
from vllm_sparse.step.rows import DecodeRows, ServerSize, TokenLists

CALLS, REPEATS = 50, 9
BLOCK_TOKENS = 32
GRAPH_REPLAYS = 30
SCALE = 0.125


@dataclass(frozen=True)
class Model:
    """What of a model's configuration matters here."""

    layers: int
    query_heads: int
    kv_heads: int
    head_size: int

    @classmethod
    def read(cls, folder: Path) -> Model:
        """From the model's folder."""
        config = json.loads((folder / "config.json").read_text())
        heads = config["num_attention_heads"]
        head_size = config.get("head_dim") or config["hidden_size"] // heads
        return cls(config["num_hidden_layers"], heads, config["num_key_value_heads"], head_size)


class Step:
    """A decode step's calls of the metrics.

    Args:
        model: geometry.
        rows: requests.
        seq_len: of each.
        metrics: that record.
        device: of the model.
    """

    def __init__(self, model: Model, rows: int, seq_len: int, metrics: WorkerMetrics, device: str) -> None:
        self._model = model
        self._metrics = metrics
        self._device = device
        self._spans = tuple(RowSpan(row, row, 1, seq_len) for row in range(rows))
        self._method = Tidal()
        self._roles = layer_roles(self._method, model.layers)
        blocks = -(-seq_len // BLOCK_TOKENS)
        cache = torch.randn(blocks, model.kv_heads, BLOCK_TOKENS, 2 * model.head_size, device=device)
        table = torch.arange(blocks, dtype=torch.int32, device=device)
        self._keys = PlainKeys(cache, table, seq_len)
        self._query = torch.randn(1, model.query_heads, model.head_size, device=device)
        pages = torch.arange(blocks, dtype=torch.int32, device=device).repeat(model.kv_heads, 1)
        kept = torch.full((model.kv_heads,), seq_len, dtype=torch.int32, device=device)
        self._lists = PageList(pages, kept, BLOCK_TOKENS)

    def one_by_one(self) -> None:
        """Rows that are served one after the other, with lists of their own in two layers."""
        rows = tuple(DecodeRow(span, self._method, self._roles, {}) for span in self._spans)
        self._metrics.collect_finished()
        record = self._metrics.start_step(StepPlan(range(self._model.layers), self._spans, decode=rows))
        for row in rows:
            for layer in reading_layers(self._roles):
                record.count(layer, row.span, self._lists.kept_tokens, 1, self._model.kv_heads)
        record.finish()

    def at_once(self) -> None:
        """Rows that are served at once, as in CUDA graphs."""
        setting = RowSetting(self._method, 0, self._roles, 0, False)
        rows = tuple(BatchRow(span, setting) for span in self._spans)
        self._metrics.collect_finished()
        self._metrics.start_step(StepPlan(range(self._model.layers), self._spans, batch=rows))
        self._metrics.observe_batch(rows)

    def timing(self) -> None:
        """What a timed step has more."""
        timer = StepTimer(torch.cuda.is_available(), [("decode", "tidal")] * len(self._spans))
        for role in self._roles:
            if role.writes_list:
                for _ in self._spans:
                    with timer.serving("decode", ["tidal"]):
                        pass
            elif role.reads_list:
                # The launch's own two marks, and those of the rows that share it.
                for _ in range(2):
                    with timer.serving("decode", ["tidal"] * len(self._spans)):
                        pass
        self._metrics.finish_step([], timer)
        self._metrics.collect_finished()

    def recall(self) -> None:
        """What a step has more in which recall is measured."""
        attention_recall(self._query, self._keys, self._lists, 1, SCALE)


class Graph:
    """What of the metrics is in the CUDA graph of a decode step in which all rows are served at once.

    Args:
        model: geometry.
        rows: requests.
        seq_len: of each.
        metrics: that record.
    """

    def __init__(self, model: Model, rows: int, seq_len: int, metrics: WorkerMetrics) -> None:
        device = torch.device("cuda")
        method = Tidal()
        roles = layer_roles(method, model.layers)
        setting = RowSetting(method, 0, roles, 0, False)
        size = ServerSize(rows, seq_len, model.layers, model.kv_heads)
        buffers = DecodeBuffers(rows, size, [method], ServerConfig().decode_list_tokens, device)
        blocks = -(-seq_len // BLOCK_TOKENS)
        table = torch.arange(blocks, dtype=torch.int32, device=device).repeat(rows, 1)
        contexts = torch.full((rows,), seq_len, dtype=torch.int32, device=device)
        launches = buffers.launches([setting], all_sparse=True)
        self._step = DecodeStep(buffers, rows, launches, contexts, table, 0)
        self._query = torch.randn(rows, model.query_heads, model.head_size, device=device, dtype=torch.bfloat16)
        self._cache = torch.randn(
            blocks, model.kv_heads, BLOCK_TOKENS, 2 * model.head_size, device=device, dtype=torch.bfloat16
        )
        self._rows = DecodeRows(self._query, self._cache, table, contexts, SCALE)
        self._metrics = metrics
        self._timer = GraphTimer(dict(enumerate(launches)), device)
        self._recall = GraphRecall(reading_layers(roles)[0], TakenRow(buffers.lists, model.kv_heads))
        layer_lists = self._step.contexts.kept_tokens[self._recall.layer]
        self._lists = TokenLists(self._step.lists.slots, layer_lists)
        self._row = BatchRow(RowSpan(0, 0, 1, seq_len), setting)

    def replayed(self) -> None:
        """What each replay does."""
        for layer, launches in enumerate(self._step.launches):
            mark = self._timer.marks(layer, [])
            mark(ASIDE)
            if launches.writing_ahead:
                mark(SELECTION)
            if launches.reading:
                mark(ATTENTION)
            if layer == self._recall.layer:
                self._recall.take(self._rows, self._lists)

    def timing(self) -> None:
        """What a timed step has more."""
        self._metrics.observe_graph(self._timer, Counter({("decode", "tidal"): 1}))
        self._metrics.collect_finished()

    def recall(self) -> None:
        """What a step has more in which recall is measured."""
        self._recall.observe(self._row, self._metrics.observe_recall)
        self._metrics.collect_finished()


def host_seconds(call: Callable[[], object]) -> float:
    """Mean time of consecutive calls, median over several such means: other work on the machine comes in bursts."""
    return statistics.median(mean_seconds(call, CALLS) for _ in range(REPEATS))


@dataclass(frozen=True)
class MeasuredStep:
    """A decode step of an engine.

    Attributes:
        seconds: of the step.
        more_seconds: how much longer it is than without the metrics' calls, one number a pair of generations.
    """

    seconds: float
    more_seconds: tuple[float, ...]

    @property
    def longer_by(self) -> str:
        """Microseconds that it is longer, the median of the pairs and its interval."""
        more = [seconds * 1e6 for seconds in self.more_seconds]
        return interval_in_words({"value": statistics.median(more), "interval": interval_of_median(more)}, "{:.1f}")


def leave_metrics_out(_worker: object, left_out: bool) -> None:
    """Run in a worker: leave out what the metrics do in each step, or do it again."""
    metrics = WorkerMetrics.get()
    without: dict[str, Callable[..., object]] = {
        **dict.fromkeys(("collect_finished", "observe_batch", "finish_step"), lambda *_: None),
        "start_step": lambda plan: StepRecord(metrics, plan),
    }
    for name, nothing in without.items():
        if left_out:
            setattr(metrics, name, nothing)
        else:
            vars(metrics).pop(name, None)


def measure_step(llm: Any, rows: int, seq_len: int, tokens: int, pairs: int) -> MeasuredStep:
    """Time of a decode step: from the first token of the request that starts last to its last one, by its tokens."""
    from vllm import SamplingParams

    extras = {"sparse_decode": "tidal", "sparse_min_tokens": 0, "sparse_unprofitable": "sparse"}
    params = SamplingParams(max_tokens=tokens + 1, ignore_eos=True, temperature=0, extra_args=extras)
    prompts = [{"prompt_token_ids": [10 + row] + [20] * (seq_len - 1)} for row in range(rows)]

    def step_seconds() -> float:
        found = [output.metrics for output in llm.generate(prompts, params, use_tqdm=False)]
        last = max(found, key=lambda request: request.first_token_ts)
        return float(last.last_token_ts - last.first_token_ts) / tokens

    step_seconds()
    spent: dict[bool, list[float]] = {False: [], True: []}
    for pair in range(pairs):
        # Either one comes first in every other pair, so that a drift favours none.
        for left_out in (pair % 2 == 0, pair % 2 == 1):
            llm.collective_rpc(leave_metrics_out, args=(left_out,))
            spent[left_out].append(step_seconds())
    llm.collective_rpc(leave_metrics_out, args=(False,))
    more = (kept - left_out for kept, left_out in zip(spent[False], spent[True], strict=True))
    return MeasuredStep(statistics.median(spent[False]), tuple(more))


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("loadtest/model/weights"))
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8], help="requests of a step")
    parser.add_argument("--context", type=int, default=8192, help="tokens of each request's context")
    parser.add_argument("--tokens", type=int, default=256, help="decode steps of a generation that is timed")
    parser.add_argument("--pairs", type=int, default=20, help="generations with and without the metrics' calls")
    parser.add_argument("--engine", type=json.loads, default={}, help="further arguments of vllm.LLM, as JSON")
    arguments = parser.parse_args()
    model = Model.read(arguments.model)
    # vLLM sends functions to its workers only when told to; these are our own.
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    # Each prompt is computed once: it is the decode steps that count.
    with engine(str(arguments.model), "SPARSE", enable_prefix_caching=True, **arguments.engine) as llm:
        steps = []
        for rows in arguments.rows:
            steps.append(measure_step(llm, rows, arguments.context, arguments.tokens, arguments.pairs))
            # What takes minutes is not lost with what follows.
            print(f"{rows} rows: a step is longer by {steps[-1].longer_by} us", file=sys.stderr, flush=True)
        # In a process of its own, as a worker, which writes to the directory that this one announced.
        task = (model, arguments.rows, arguments.context, steps)
        child = multiprocessing.get_context("spawn").Process(target=print_table, args=task)
        child.start()
        child.join()
    raise SystemExit(child.exitcode)


def print_table(model: Model, batches: list[int], seq_len: int, steps: list[MeasuredStep]) -> None:
    """Measure the metrics of decode steps and print them beside the steps.

    Args:
        model: geometry.
        batches: requests of each step.
        seq_len: of each request.
        steps: of the engine, one a batch.
    """
    write_to_announced_directory()
    metrics = WorkerMetrics(recording=True, memory=MemoryMetrics(0, 0))
    metrics.start_serving(
        Geometry(range(model.layers), model.query_heads, model.kv_heads, 4 * model.head_size), Sampling()
    )
    config = ServerConfig()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # How the engine serves these rows.
    served = "at once" if device == "cuda" else "one by one"
    print("| rows | served | counting us | timing us | recall us | in the graph us | step ms | share | longer by us |")
    print("|---|---|---|---|---|---|---|---|---|")
    for rows, measured in zip(batches, steps, strict=True):
        step = Step(model, rows, seq_len, metrics, device)
        sampled: Step | Graph = step
        replayed = 0.0
        for name, call in (("one by one", step.one_by_one), ("at once", step.at_once)):
            if name == "at once" and device == "cuda":
                sampled = graph = Graph(model, rows, seq_len, metrics)
                replayed = graph_seconds(graph.replayed, GRAPH_REPLAYS)
            parts = (
                host_seconds(call),
                host_seconds(sampled.timing) / config.timing_interval_steps,
                host_seconds(sampled.recall) / config.recall_interval_steps,
                replayed,
            )
            line = [str(rows), name, *(f"{seconds * 1e6:.1f}" for seconds in parts)]
            if name == served:
                line += [
                    f"{measured.seconds * 1e3:.2f}",
                    f"{sum(parts) / measured.seconds:.2%}",
                    measured.longer_by,
                ]
            else:
                line += ["", "", ""]
            print(f"| {' | '.join(line)} |")


if __name__ == "__main__":
    main()
