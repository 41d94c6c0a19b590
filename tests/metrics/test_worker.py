"""Worker metrics: values, and their way from a worker process to the server's registry."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vllm_sparse.metrics import DIRECTORY_VARIABLE, PROMETHEUS_VARIABLE, RowDensity
from vllm_sparse.step.plan import RowSpan

SERVER = """
import subprocess, sys, os
from vllm_sparse.metrics import announce_directory, DIRECTORY_VARIABLE, PROMETHEUS_VARIABLE
announce_directory()
announce_directory()
assert PROMETHEUS_VARIABLE not in os.environ, "the server's own metrics need no files"
directory = os.environ[DIRECTORY_VARIABLE]
subprocess.run([sys.executable, "-c", sys.argv[1]], check=True)
import prometheus_client
from prometheus_client import multiprocess
registry = prometheus_client.CollectorRegistry()
multiprocess.MultiProcessCollector(registry, path=directory)
print(prometheus_client.generate_latest(registry).decode())
print("directory", directory)
"""
WORKER = """
from collections import Counter
import torch
from vllm_sparse.step.eligibility import DenseReason
from vllm_sparse.step.launch import LayerLaunches
from vllm_sparse.step.plan import BatchRow, DecodeRow, DenseStepRow, StepPlan, layer_roles
from vllm_sparse.step.requests import RowSetting
from vllm_sparse.methods.block_topk import BlockTopk
from vllm_sparse.methods.tidal import Tidal
from vllm_sparse.methods.token_topk import TokenTopk
from vllm_sparse.metrics import Geometry, Sampling
from vllm_sparse.metrics.directory import write_to_announced_directory
from vllm_sparse.metrics.graph_timing import GraphTimer
from vllm_sparse.metrics.memory import MemoryMetrics
from vllm_sparse.metrics.timing import ASIDE, ATTENTION, SELECTION
from vllm_sparse.step.plan import RowSpan
from vllm_sparse.metrics import RowDensity, WorkerMetrics
write_to_announced_directory()
metrics = WorkerMetrics(recording=True, memory=MemoryMetrics(0, 0, "m"), model_name="m")
metrics.count_fallbacks({("prefill", "flexprefill", DenseReason.SHORT_PROMPT_CHUNK): 1})
metrics.count_fallbacks({("prefill", "flexprefill", DenseReason.SHORT_PROMPT_CHUNK): 1})
newest = RowDensity("decode", "tidal")
newest.add(5, torch.tensor([64, 64], dtype=torch.int32), RowSpan(3, 900, 1, 256), 1, 2)
density = RowDensity("prefill", "flexprefill")
for layer in range(2):
    density.add(layer, torch.tensor([128, 256], dtype=torch.int32), RowSpan(0, 0, 256, 256), 128, 1)
metrics.finish_step([density, newest, RowDensity("decode", "nothing sparse")])
metrics.finish_step([])
metrics.collect_finished()
timer = GraphTimer(dict.fromkeys(range(4), LayerLaunches(False, (), (0,), True)), torch.device("cpu"))
mark = timer.marks(2, [])
for part in (ASIDE, SELECTION, ATTENTION):
    mark(part)
timer.stamps[0, :3] = torch.tensor([1_000_000, 3_000_000, 4_000_000])
metrics.observe_graph(timer, Counter({("decode", "hip"): 3, ("decode", "blocktopk"): 1}))
metrics.start_serving(Geometry(layers=range(4), query_heads=4, kv_heads=2, token_bytes=10), Sampling(1, 1))
method = BlockTopk(budget_tokens=64, sink_tokens=16, recent_tokens=16, dense_layers=2)
setting = RowSetting(method, 64, layer_roles(method, 4), 0, False)
rows = [BatchRow(RowSpan(row, row, 1, context), setting) for row, context in enumerate((128, 256, 1024))]
metrics.observe_batch(rows)
every = TokenTopk(budget_tokens=96, dense_every_steps=256)
for row in rows:
    metrics.observe_dense_steps([DenseStepRow(row.span, every, layer_roles(every, 4))])
assert metrics.stats()["density"]["decode"]["tokentopk"] == {"rows": 3, "density": [[1.0] * 4] * 4}
# A setting by which no layer reads a list.
method = Tidal(dense_layers=3, selection_reads="everything")
dense = DecodeRow(rows[0].span, method, layer_roles(method, 4), {})
for decode, batch in (([dense], []), ([], rows)):
    plan = StepPlan(range(4), decode=tuple(decode), batch=tuple(batch))
    record = metrics.start_step(plan)
    assert record.timer.rows.total() == len(decode) + len(batch)
    assert (record.batch_recall is None) == (not batch)
    assert not record.recall_layers
assert record.batch_recall.layer in (2, 3)
assert record.batch_recall.row is rows[record.batch_recall.place]
silent = WorkerMetrics(recording=False)
silent.count_fallbacks({("decode", "tidal", DenseReason.SHORT_CONTEXT): 1})
silent.finish_step([density])
"""


def samples(text: str) -> dict[str, float]:
    """Prometheus text as name with labels to value."""
    lines = [line for line in text.splitlines() if line.startswith("vllm_sparse_")]
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}


def run_server(environment: dict[str, str]) -> str:
    run = subprocess.run(
        [sys.executable, "-c", SERVER, WORKER],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout


def clean_environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if key not in (DIRECTORY_VARIABLE, PROMETHEUS_VARIABLE)}


def test_a_worker_writes_where_the_server_announced() -> None:
    output = run_server(clean_environment())
    values = samples(output)
    fallback = 'vllm_sparse_fallbacks_total{method="flexprefill",model_name="m",phase="prefill",reason="short_chunk"}'
    assert values[fallback] == 2
    assert [name for name in values if 'model_name="m"' not in name] == []
    assert any("device_memory_free" in name for name in values)
    decode, prefill = (
        '{method="tidal",model_name="m",phase="decode"}',
        '{method="flexprefill",model_name="m",phase="prefill"}',
    )
    assert values["vllm_sparse_density_ratio_count" + decode] == 1
    assert values["vllm_sparse_density_ratio_sum" + decode] == 0.25
    assert values["vllm_sparse_density_ratio_count" + prefill] == 1
    assert values["vllm_sparse_density_ratio_sum" + prefill] == 1.0
    assert 'vllm_sparse_density_ratio_bucket{le="0.2",method="tidal",model_name="m",phase="decode"} 0.0' in output
    assert 'vllm_sparse_density_ratio_bucket{le="0.3",method="tidal",model_name="m",phase="decode"} 1.0' in output
    batch = '{method="blocktopk",model_name="m",phase="decode"}'
    assert values["vllm_sparse_density_ratio_count" + batch] == 3
    assert values["vllm_sparse_density_ratio_sum" + batch] == pytest.approx(64 / 128 + 64 / 256 + 64 / 1024)
    assert 'vllm_sparse_density_ratio_bucket{le="0.4",method="blocktopk",model_name="m",phase="decode"} 2.0' in output
    saved = (128 + 256 + 1024 - 3 * 64) * 2 * 2 * 10
    assert values["vllm_sparse_kv_saved_bytes_total" + batch] == saved
    assert values["vllm_sparse_kv_read_bytes_total" + batch] == (128 + 256 + 1024) * 2 * 4 * 10 - saved
    dense_steps = '{method="tokentopk",model_name="m",phase="decode"}'
    assert values["vllm_sparse_density_ratio_count" + dense_steps] == 3
    assert values["vllm_sparse_density_ratio_sum" + dense_steps] == 3
    assert values["vllm_sparse_kv_saved_bytes_total" + dense_steps] == 0
    assert values["vllm_sparse_kv_read_bytes_total" + dense_steps] == (128 + 256 + 1024) * 2 * 4 * 10
    graph = '{method="hip",model_name="m",phase="decode"}'
    assert values["vllm_sparse_timed_rows_total" + graph] == 3
    assert values["vllm_sparse_selection_seconds_total" + graph] == pytest.approx(0.75 * 4 * 0.002)
    assert values["vllm_sparse_attention_seconds_total" + graph] == pytest.approx(0.75 * 4 * 0.001)
    assert values["vllm_sparse_attention_total_seconds_total" + graph] == pytest.approx(0.75 * 4 * 0.003)
    assert "nothing sparse" not in output
    assert not any("short_context" in name for name in values), "a silent rank must record nothing"
    directory = output.split("directory ")[1].strip()
    assert not Path(directory).exists(), "the server removes its directory"


@pytest.mark.parametrize(
    ("chunk", "context", "heads"), [(256, 256, 1), (300, 1000, 4), (129, 129, 2), (1, 700, 3), (512, 1024, 2)]
)
def test_a_dense_chunk_has_density_one(chunk: int, context: int, heads: int) -> None:
    """Candidates are what rows of a dense chunk would keep, counted row by row."""
    lasts = [min(first + 128, context) for first in range(context - chunk, context, 128)]
    kept = torch.tensor(lasts * heads, dtype=torch.int32)
    density = RowDensity("prefill", "flexprefill")
    for layer in range(3):
        density.add(layer, kept.clone(), RowSpan(0, 0, chunk, context), 128, heads)
    by_head = density.kept_by_head(torch.cat(density.kept).numpy())
    assert by_head.shape == (3, heads)
    assert (by_head == density.candidates).all()
    assert density.candidates == sum(lasts)
