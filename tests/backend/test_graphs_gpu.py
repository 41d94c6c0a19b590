"""What takes a GPU to be seen of sparse decode graphs: what vLLM's runner replays, and that no copy waits."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import oracle
from vllm_sparse.backend.decode_buffers import DecodeBuffers
from vllm_sparse.backend.decode_graphs import ANY, MOST_ROWS_ALONE, beside_dense, captured_sizes
from vllm_sparse.backend.execution import gather_index
from vllm_sparse.backend.impl import gather_tokens
from vllm_sparse.backend.prefill import prompt_chunk_rows
from vllm_sparse.host_copy import indices_on
from vllm_sparse.methods.tidal import Tidal
from vllm_sparse.step.chunks import one_chunk
from vllm_sparse.step.plan import RowSpan
from vllm_sparse.step.requests import RowSetting
from vllm_sparse.step.rows import ServerSize

MODEL = Path(__file__).parents[2] / "loadtest" / "model" / "weights"
LAYERS = 4
# About half a second of an H200.
SLEEP_CYCLES = 1_000_000_000


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Results of `graphs_run.run` in a child process."""
    result = tmp_path_factory.mktemp("graphs") / "result.json"
    script = Path(__file__).with_name("graphs_run.py")
    ended = subprocess.run(
        [sys.executable, str(script), str(MODEL), str(result)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=580,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout[-6000:]
    found: dict[str, Any] = json.loads(result.read_text())
    return found


@oracle.needs_cuda
@pytest.mark.parametrize(
    ("name", "graphs"),
    [
        ("alike", "tidal"),
        ("beside dense", beside_dense("tidal")),
        ("smaller budgets", "tidal"),
        ("fewer sparse layers", beside_dense("hip")),
        ("other roles", ANY),
        ("other methods", ANY),
        ("guarded", ANY),
        ("many", beside_dense("tidal")),
    ],
)
def test_steps_of_mixed_knobs_replay_a_graph(served: dict[str, Any], name: str, graphs: str) -> None:
    """The one that launches least; none runs outside."""
    found = served["rounds"][name]
    assert found["outside"] == 0
    assert graphs in found["names"]
    if name == "many":
        assert found["most_rows"] > 256
    else:
        assert len(found["names"]) == 1


@oracle.needs_cuda
def test_dense_steps_of_a_row_replay_the_graph_that_holds_dense_rows(served: dict[str, Any]) -> None:
    """At contexts of 404, 408, 412, 416 and 420 tokens; at the others all rows are sparse."""
    found = served["rounds"]["dense steps"]
    assert found["outside"] == 0
    assert set(found["names"]) == {"tidal", beside_dense("tidal")}
    assert found["names"][beside_dense("tidal")] == 5


@oracle.needs_cuda
def test_few_sizes_are_captured_and_more_rows_than_before(served: dict[str, Any]) -> None:
    captured = served["captured"]
    sizes = captured[ANY]
    assert sizes == captured_sizes(sizes)
    assert sizes[-1] == 320
    assert captured[beside_dense("tidal")] == captured[beside_dense("hip")] == sizes
    assert captured["tidal"] == captured["hip"] == [size for size in sizes if size <= MOST_ROWS_ALONE]


@oracle.needs_cuda
def test_a_request_without_room_is_refused(served: dict[str, Any]) -> None:
    assert "tidal_budget_tokens is 9000: lists of 9000 tokens are longer than decode_list_tokens" in served["error"]


def told() -> None:
    size = ServerSize(8, 4096, LAYERS, 2)
    buffers = DecodeBuffers(8, size, [Tidal()], 4096, torch.device("cuda"))
    roles = tuple(Tidal().layer_roles(LAYERS))
    buffers.tell([RowSetting(Tidal(), 100, roles, slot, True) for slot in range(5)])


def rows_of_a_chunk() -> None:
    prompt_chunk_rows.cache_clear()
    one_chunk.cache_clear()
    prompt_chunk_rows(1000, 128, 4, 2, torch.device("cuda"))


def subset_of_dense_rows() -> None:
    from vllm.v1.attention.backends.flash_attn import FlashAttentionMetadata

    from vllm_sparse.backend.cuda import SparseFlashAttentionImpl

    device = torch.device("cuda")
    metadata = FlashAttentionMetadata(
        num_actual_tokens=27,
        max_query_len=3,
        query_start_loc=torch.zeros(10, dtype=torch.int32, device=device),
        max_seq_len=99,
        seq_lens=torch.zeros(9, dtype=torch.int32, device=device),
        block_table=torch.zeros(9, 4, dtype=torch.int32, device=device),
        slot_mapping=torch.zeros(27, dtype=torch.int64, device=device),
    )
    spans = [RowSpan(row, 3 * row, 3, 70 + row) for row in (0, 2, 7)]
    subset: Any = SparseFlashAttentionImpl.dense_subset(None, None, None, metadata, spans)  # type: ignore[arg-type]
    assert (subset.num_actual_tokens, subset.max_query_len, subset.max_seq_len) == (9, 3, 77)


def sleep() -> None:
    """Keep the device busy."""
    torch.cuda._sleep(SLEEP_CYCLES)  # type: ignore[no-untyped-call]


@oracle.needs_cuda
@pytest.mark.parametrize(
    "call",
    [
        lambda: gather_index([0, 2, 5], torch.device("cuda")),
        lambda: indices_on(torch.device("cuda"), [3, 4]),
        told,
        rows_of_a_chunk,
        subset_of_dense_rows,
        lambda: gather_tokens([RowSpan(0, 0, 3, 70), RowSpan(2, 9, 3, 72)], torch.device("cuda")),
    ],
    ids=["gather_index", "indices_on", "tell", "prompt_chunk_rows", "dense_subset", "gather_tokens"],
)
def test_copies_do_not_wait_for_the_device(call: Callable[[], object]) -> None:
    # Memory is allocated and kernels are loaded by then, which does wait.
    call()
    torch.cuda.synchronize()
    sleep()
    asleep = torch.cuda.current_stream().record_event()
    call()
    assert not asleep.query(), "the host went on only when the device was done"
    torch.cuda.synchronize()


@oracle.needs_cuda
def test_what_is_copied_arrives() -> None:
    """Also where the device reads it late, after the host has copied other values."""
    sleep()
    copies = [indices_on(torch.device("cuda"), [number, number + 1, number + 5]) for number in range(50)]
    assert [copy.tolist() for copy in copies] == [[number, number + 1, number + 5] for number in range(50)]
