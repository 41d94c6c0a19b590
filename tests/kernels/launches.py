"""What kernels methods launch, and how, noted where there is no GPU: nothing is compiled or launched."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from tests.kernels.interpreter import as_on_a_gpu
from vllm_sparse.backend.decode_batch import BatchLayer, DecodeStep
from vllm_sparse.backend.decode_buffers import DecodeBuffers
from vllm_sparse.kernels.page_list import launch_lists
from vllm_sparse.kernels.page_summaries import SummaryKind
from vllm_sparse.kernels.row_queries import gather_rows, scatter_rows
from vllm_sparse.keys import PlainKeys
from vllm_sparse.methods.decode import BatchDecodeMethod
from vllm_sparse.methods.prefill import Layer, PrefillMethod
from vllm_sparse.pages import PageList, empty_lists
from vllm_sparse.step.chunks import PromptChunks, launch_rows, prompt_blocks
from vllm_sparse.step.launch import Executor, Launch, LayerLaunches
from vllm_sparse.step.plan import RowSpan

BLOCK_TOKENS = 128


@dataclass(frozen=True)
class Target:
    """A GPU that Triton compiles for.

    Attributes:
        backend: ``cuda`` or ``hip``.
        architecture: compute capability without its point, or AMD's name.
        shared_memory_bytes: that a program may have at most.
    """

    backend: str
    architecture: int | str
    shared_memory_bytes: int

    @property
    def name(self) -> str:
        """As compilers call it."""
        return f"sm_{self.architecture}" if self.backend == "cuda" else str(self.architecture)

    @property
    def triton(self) -> Any:
        """As Triton has it."""
        from triton.backends.compiler import GPUTarget

        return GPUTarget(self.backend, self.architecture, 32 if self.backend == "cuda" else 64)


HOPPER = Target("cuda", 90, 227 * 1024)


class _Driver:
    """What Triton asks its driver for before it launches."""

    def __init__(self, target: Target) -> None:
        self._target = target.triton

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> str:
        return f"nowhere, {self._target.arch}"

    def get_current_stream(self, device: str) -> None:
        return None


def _hashed(value: Any) -> Any:
    """A value as JSON has it, with tuples for lists."""
    return tuple(map(_hashed, value)) if isinstance(value, list) else value


@dataclass(frozen=True)
class Noted:
    """A kernel as it was about to be compiled.

    Attributes:
        kernel: the function under `triton.jit`.
        signature: Triton's type of each parameter.
        constants: values of those that are constant.
        attributes: what is known of arguments, such as alignments.
        options: warps, stages and so on.
    """

    kernel: Any
    signature: dict[str, str]
    constants: dict[Any, Any]
    attributes: dict[Any, Any]
    options: dict[str, Any]

    def compile(self, target: Target) -> Any:
        """Triton's compiled kernel."""
        import triton
        from triton.compiler import ASTSource

        source = ASTSource(self.kernel, self.signature, self.constants, self.attributes)
        return triton.compile(source, target=target.triton, options=self.options)


def note_launches(monkeypatch: pytest.MonkeyPatch, target: Target) -> dict[tuple[str, str], Noted]:
    """Note all launches from now on as if on a GPU, over zeros.

    Args:
        monkeypatch: of the test.
        target: that GPU.

    Returns:
        Kernels by their name and what they are specialised on; filled as they are launched.
    """
    import triton

    found: dict[tuple[str, str], Noted] = {}

    def note(*, key: str, fn: Any, compile: dict[str, Any], **_: object) -> bool:  # noqa: A002 (Triton's name)
        if (fn.name, key) not in found:
            options = json.loads(compile["specialization_data"])["options"]
            options = {name: _hashed(value) for name, value in options.items()}
            attributes = compile["configs"][0]
            signature, constants = compile["signature"], compile["constants"]
            found[fn.name, key] = Noted(fn.jit_function, signature, constants, attributes, options)
        # "Do not compile it", nor launch it.
        return True

    monkeypatch.setattr(triton.runtime.driver, "_active", _Driver(target))
    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", note)
    as_on_a_gpu(monkeypatch)
    monkeypatch.setattr(torch, "empty", torch.zeros)
    return found


def choose_for_chunks(
    method: PrefillMethod, query: torch.Tensor, cache: torch.Tensor, sizes: Sequence[tuple[int, int]]
) -> PageList:
    """Let a method choose for the prompt chunks of a step, and launch what surrounds the stock kernel.

    Args:
        method: the method.
        query: ``[tokens, query_heads, head_size]``, of all chunks one after the other.
        cache: ``[blocks, kv_heads, BLOCK_TOKENS, 2 * head_size]``, of each prompt's blocks in order.
        sizes: tokens of each chunk and of its context, those of the chunk included.
    """
    heads, kv_heads, device = query.shape[1], cache.shape[1], query.device
    starts = itertools.accumulate((tokens for tokens, _ in sizes), initial=0)
    spans = [RowSpan(row, start, *size) for row, (start, size) in enumerate(zip(starts, sizes, strict=False))]
    table = torch.arange(cache.shape[0], dtype=torch.int32, device=device).expand(len(sizes), -1).contiguous()
    keys = tuple(PlainKeys(cache, table[row], seq_len) for row, (_, seq_len) in enumerate(sizes))
    blocks = prompt_blocks(spans, method.query_block_tokens, device)
    page_size_tokens = min(BLOCK_TOKENS, method.page_tokens)
    list_heads = method.list_heads(heads, kv_heads)
    width = -(-blocks.longest_seq_len // page_size_tokens)
    lists = empty_lists(list_heads * blocks.blocks, width, page_size_tokens, device)
    layers = [Layer(method.dense_layers, 0)] * len(sizes)
    chunks = PromptChunks(blocks, query, keys, table, query.shape[2] ** -0.5)
    method.select_chunks(chunks, layers, method.prepare(blocks, [None] * len(sizes)), lists)
    rows = launch_rows([blocks], list_heads, kv_heads, device)
    launch_lists(lists, rows, table, BLOCK_TOKENS, kv_heads)
    scatter_rows(gather_rows(query, rows), rows, torch.zeros_like(query))
    return lists


class Nothing(Executor):
    """Leaves the output alone."""

    def run(
        self, launch: Launch, query: torch.Tensor, output: torch.Tensor, kv_cache: torch.Tensor, scale: float
    ) -> None:
        pass


@dataclass(frozen=True)
class DecodeRoom:
    """Buffers and a cache of zeros for decode rows that are served at once.

    Attributes:
        buffers: of the rows.
        cache: ``[blocks, kv_heads, BLOCK_TOKENS, 2 * head_size]``.
        query_heads: of the model.
        dtype: of queries.
        contexts: int32 ``[most rows]`` lengths.
        table: int32 ``[most rows, blocks of a row]``.
    """

    buffers: DecodeBuffers
    cache: torch.Tensor
    query_heads: int
    dtype: torch.dtype
    contexts: torch.Tensor
    table: torch.Tensor

    @functools.cached_property
    def summaries(self) -> dict[SummaryKind, torch.Tensor]:
        """Of the cache's pages, of each kind that a method asks for."""
        blocks, kv_heads, _, double_head_size = self.cache.shape
        kinds = {method.summaries for method in self.buffers.methods if method.summaries is not None}
        return {
            kind: torch.zeros(
                *(blocks, kv_heads, BLOCK_TOKENS // kind.page_tokens, kind.width(double_head_size // 2)),
                dtype=kind.dtype(self.cache.dtype),
                device=self.cache.device,
            )
            for kind in kinds
        }

    def serve(
        self,
        launches: list[LayerLaunches],
        rows: slice | torch.Tensor,
        capacity_tokens: int,
        query: torch.Tensor | None = None,
    ) -> None:
        """Serve some of the rows, all layers, with the same queries ``[rows, query_heads, head_size]`` or zeros."""
        seq_len = self.contexts[rows]
        count, head_size = seq_len.shape[0], self.cache.shape[3] // 2
        step = DecodeStep(self.buffers, count, launches, seq_len, self.table[rows], capacity_tokens)
        if query is None:
            query = torch.zeros(count, self.query_heads, head_size, dtype=self.dtype)
        for layer in range(len(launches)):
            output = torch.zeros_like(query)
            step.attend(BatchLayer(layer, query, self.cache, 0.1, output, Nothing(), lambda *_: None, self.summaries))


def served_at_once(methods: list[Any]) -> list[BatchDecodeMethod]:
    """Those of decode methods that serve rows at once."""
    return [method for method in methods if isinstance(method, BatchDecodeMethod)]
