"""What the host does for the prompt chunks of a layer does not grow with their number."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.kernels.launches import BLOCK_TOKENS, HOPPER, note_launches
from vllm_sparse.keys import PlainKeys
from vllm_sparse.methods.dhsa import Dhsa
from vllm_sparse.methods.flexprefill import FlexPrefill
from vllm_sparse.methods.hip import Hip
from vllm_sparse.methods.prefill import Layer, PrefillMethod
from vllm_sparse.methods.sale import Sale
from vllm_sparse.pages import empty_lists
from vllm_sparse.step.chunks import PromptChunks, prompt_blocks
from vllm_sparse.step.plan import RowSpan

pytest.importorskip("triton")

HEADS, KV_HEADS, HEAD_SIZE = 8, 2, 128
METHODS: dict[str, PrefillMethod] = {
    "dhsa": Dhsa(),
    "dhsa, lists of candidates": Dhsa(density=0.2),
    "dhsa, covering": Dhsa(density=0.5, coverage=0.9),
    "flexprefill": FlexPrefill(),
    "flexprefill by KV head": FlexPrefill(list_per="kv_head", query_block_tokens=64),
    "flexprefill in stretches": FlexPrefill(sample_every_tokens=512),
    "hip": Hip(),
    "hip, scores per query head": Hip(
        stage_block_tokens=(64, 16),
        stage_budget_tokens=(2048, 512),
        query_stride=(1, 4),
        scores_per="query_head",
        query_block_tokens=64,
    ),
    "sale": Sale(),
    "sale, 128 rows": Sale(query_block_tokens=128),
}
SIZES = [(512, 4096), (300, 1000), (1, 700), (257, 2111), (640, 640)]


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operators of PyTorch that run, by name."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.count[str(func)] += 1
        return func(*args, **(kwargs or {}))


def calls(method: PrefillMethod, sizes: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Operators and kernels that one layer calls, as if on a GPU, once tables are prepared."""
    import triton

    with monkeypatch.context() as patch:
        note_launches(patch, HOPPER)
        cache = torch.zeros(32, KV_HEADS, BLOCK_TOKENS, 2 * HEAD_SIZE, dtype=torch.bfloat16)
        table = torch.arange(32, dtype=torch.int32).expand(len(sizes), -1).contiguous()
        tokens = sum(tokens for tokens, _ in sizes)
        query = torch.zeros(tokens, HEADS, HEAD_SIZE, dtype=torch.bfloat16)
        start, spans = 0, []
        for row, size in enumerate(sizes):
            spans.append(RowSpan(row, start, *size))
            start += size[0]
        blocks = prompt_blocks(spans, method.query_block_tokens, query.device)
        keys = tuple(PlainKeys(cache, table[span.row], span.seq_len) for span in spans)
        chunks = PromptChunks(blocks, query, keys, table, HEAD_SIZE**-0.5)
        prepared = method.prepare(blocks, [None] * len(sizes))
        page = min(BLOCK_TOKENS, method.page_tokens)
        list_heads = method.list_heads(HEADS, KV_HEADS)
        lists = empty_lists(list_heads * blocks.blocks, -(-blocks.longest_seq_len // page), page, query.device)
        launched: Counter[str] = Counter()
        run = triton.runtime.JITFunction.run

        def counted(kernel: Any, *args: Any, **kwargs: Any) -> Any:
            launched[kernel.__name__] += 1
            return run(kernel, *args, **kwargs)

        patch.setattr(triton.runtime.JITFunction, "run", counted)
        with Operations() as operations:
            method.select_chunks(chunks, [Layer(1, 0)] * len(sizes), prepared, lists)
        assert launched
        launched.update(operations.count)
        return launched


@pytest.mark.parametrize("name", METHODS)
def test_several_chunks_take_as_many_launches_as_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # What a process makes once is there afterwards.
    calls(METHODS[name], SIZES, monkeypatch)
    assert calls(METHODS[name], SIZES, monkeypatch) == calls(METHODS[name], SIZES[:1], monkeypatch)


def test_the_default_of_dhsa_takes_four_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, masses, what is kept, lists; on a small model the host bounds prompts, by launches."""
    calls(Dhsa(), SIZES, monkeypatch)
    launched = calls(Dhsa(), SIZES, monkeypatch)
    free = ("aten.zeros.", "aten.view.", "aten.detach.")
    assert sum(count for name, count in launched.items() if not name.startswith(free)) == 4


def test_several_stretches_take_as_many_launches_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    size = [(2048, 4096)]
    one, four = FlexPrefill(), FlexPrefill(sample_every_tokens=512)
    calls(four, size, monkeypatch)
    assert calls(four, size, monkeypatch) == calls(one, size, monkeypatch)
