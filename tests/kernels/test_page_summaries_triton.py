"""Page summaries in Triton equal their PyTorch specification."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from tests import oracle
from tests.kernels.chunks import SPANS, some_chunks
from tests.kernels.hopper import compile_for_hopper, spilled_bytes
from tests.kernels.interpreter import CAN_RUN, DEVICE, needs_triton, run_under_the_interpreter
from tests.oracle import Paged, Platform
from vllm_sparse.kernels.page_summaries import SummaryContent, SummaryKind, reference
from vllm_sparse.keys import PlainKeys
from vllm_sparse.step.chunks import PromptChunks
from vllm_sparse.step.rows import DecodeRows

pytest.importorskip("triton")


@pytest.mark.skipif(CAN_RUN, reason="runs right here")
def test_under_the_interpreter() -> None:
    run_under_the_interpreter(__file__, passing=28)


@needs_triton
@pytest.mark.parametrize(
    ("kv_heads", "head_size", "context", "block_size", "page_tokens"),
    [
        pytest.param(2, 64, 700, 32, 32, id="page-is-block"),
        pytest.param(3, 80, 245, 16, 128, id="page-over-blocks"),
        pytest.param(1, 96, 257, 128, 16, id="page-in-block"),
        pytest.param(2, 128, 1, 48, 64, id="one-token"),
        pytest.param(1, 256, 96, 48, 32, id="page-across-blocks"),
        pytest.param(2, 128, 256, 64, 32, id="whole-pages"),
        pytest.param(2, 128, 257, 64, 32, id="one-key-more"),
        pytest.param(1, 128, 255, 16, 16, id="one-key-less"),
    ],
)
@pytest.mark.parametrize("content", ["mean", "bounds"])
def test_equals_reference(
    kv_heads: int, head_size: int, context: int, block_size: int, page_tokens: int, content: SummaryContent
) -> None:
    """Pages of different sign and size, so that a key in the wrong page shows; stale slots hold NaN."""
    from vllm_sparse.kernels.page_summaries import triton as summaries_triton

    seed = random.randrange(1 << 30)
    generator = torch.Generator().manual_seed(seed)
    data = paged(generator, [context], kv_heads, head_size, block_size, page_tokens)
    kind = SummaryKind(page_tokens, content)
    reader = data.reader(0)
    assert isinstance(reader, PlainKeys)
    expected = reference.page_summaries(reader, kind)
    actual = summaries_triton.page_summaries(reader, kind)
    assert actual.dtype == torch.float32
    assert actual.shape == expected.shape
    # The short last page on its own: many others would hide it.
    assert oracle.relative_error(actual[:, -1], expected[:, -1]) < 1e-6, f"seed {seed}"
    assert oracle.relative_error(actual, expected) < 1e-6, f"seed {seed}"


@needs_triton
@pytest.mark.parametrize(("block_size", "page_tokens"), [(32, 16), (16, 64)])
@pytest.mark.parametrize("bounds", [False, True], ids=["mean", "bounds"])
def test_several_requests_equal_the_reference(block_size: int, page_tokens: int, bounds: bool) -> None:
    """Each by its own row of the block table."""
    from vllm_sparse.kernels.page_summaries import triton as summaries_triton

    seed = random.randrange(1 << 30)
    generator = torch.Generator().manual_seed(seed)
    contexts = [next((span.seq_len for span in SPANS if span.row == row), 1) for row in range(8)]
    data = paged(generator, contexts, 2, 80, block_size, page_tokens)
    keys = tuple(data.reader(span.row) for span in SPANS)
    chunks = PromptChunks(some_chunks(64, DEVICE), torch.empty(0, device=DEVICE), keys, data.block_table, 1.0)
    kind = SummaryKind(page_tokens, "bounds" if bounds else "mean")
    expected, actual = reference.chunk_summaries(chunks, kind), summaries_triton.chunk_summaries(chunks, kind)
    assert actual.shape == expected.shape
    for chunk, span in enumerate(SPANS):
        pages = -(-span.seq_len // page_tokens)
        error = oracle.relative_error(actual[:, chunk, :pages], expected[:, chunk, :pages])
        assert error < 1e-6, f"chunk {chunk}, seed {seed}"


def paged(
    generator: torch.Generator, contexts: list[int], kv_heads: int, head_size: int, block_size: int, page_tokens: int
) -> Paged:
    """Requests whose pages differ in sign and size."""
    platform = Platform("plain", DEVICE, torch.float32, None)
    keys = []
    for context in contexts:
        offset = torch.randn(kv_heads, -(-context // page_tokens), 1, generator=generator).to(DEVICE)
        offset = offset.repeat_interleave(page_tokens, dim=1)[:, :context]
        keys.append(oracle.random_tensor(platform, generator, kv_heads, context, head_size) + offset)
    return oracle.paged(platform, keys, keys, block_size, generator)


def poisoned(data: Paged, kind: SummaryKind) -> torch.Tensor:
    blocks, kv_heads, block_size, double_head_size = data.kv_cache.shape
    shape = blocks, kv_heads, block_size // kind.page_tokens, kind.width(double_head_size // 2)
    return torch.full(shape, oracle.NAN, dtype=kind.dtype(torch.float32), device=DEVICE)


@needs_triton
@pytest.mark.parametrize(
    ("head_size", "block_size", "page_tokens"), [(64, 32, 16), (80, 48, 16), (128, 128, 64), (96, 16, 16)]
)
@pytest.mark.parametrize(
    "content",
    [
        "mean",
        "bounds",
        pytest.param(
            "float8_bounds",
            # Where rounding carries into the exponent, 1.998 becomes 1.
            marks=pytest.mark.skipif(DEVICE == "cpu", reason="Triton's interpreter rounds 8-bit floats wrongly"),
        ),
    ],
)
def test_stores_what_the_reference_stores(
    head_size: int, block_size: int, page_tokens: int, content: SummaryContent
) -> None:
    """Chunks of one request, then the newest tokens of a batch, of which one row stands by: in the same places."""
    from vllm_sparse.kernels.page_summaries import triton as summaries_triton

    seed = random.randrange(1 << 30)
    generator = torch.Generator().manual_seed(seed)
    contexts = [300, 1, 257, 128, 90]
    kind = SummaryKind(page_tokens, content)
    data = paged(generator, contexts, 2, head_size, block_size, page_tokens)
    expected, actual = poisoned(data, kind), poisoned(data, kind)
    for start, stop in ((0, 41), (41, 128), (128, 300)):
        for store, summaries in ((reference, expected), (summaries_triton, actual)):
            keys = data.platform.keys_of(data.kv_cache, data.block_table[0], stop)
            assert isinstance(keys, PlainKeys)
            keys.summaries = summaries
            store.store_summaries(keys, kind, start)
    assert same(actual, expected), f"seed {seed}"

    query = torch.full((len(contexts), 2, head_size), oracle.NAN, device=DEVICE)
    lengths = torch.tensor(contexts, dtype=torch.int32, device=DEVICE)
    lengths[3] = 0
    rows = DecodeRows(query, data.kv_cache, data.block_table, lengths, 1.0)
    summaries_triton.store_newest_summaries(rows, kind, actual)
    for row, context in enumerate(lengths.tolist()):
        if context:
            keys = data.reader(row)
            keys.summaries = expected
            reference.store_summaries(keys, kind, context - 1)
    assert same(actual, expected), f"seed {seed}"


def same(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    """Written in the same places, equal there but for rounding."""
    actual, expected = actual.float(), expected.float()
    written = ~expected.isnan()
    return torch.equal(~actual.isnan(), written) and oracle.relative_error(actual[written], expected[written]) < 1e-6


@pytest.mark.skipif(CAN_RUN and DEVICE == "cpu", reason="Triton only interprets in this process")
@pytest.mark.parametrize(
    ("head_size", "cache_block", "page_tokens"), [(80, 128, 16), (128, 128, 32), (128, 16, 128), (256, 128, 128)]
)
@pytest.mark.parametrize("content", ["mean", "bounds"])
def test_kernel_compiles_for_hopper(
    head_size: int, cache_block: int, page_tokens: int, content: SummaryContent, tmp_path: Path
) -> None:
    from vllm_sparse.kernels.page_summaries import triton as summaries_triton

    head_tile = 1 << (head_size - 1).bit_length()
    strides = dict.fromkeys(("cache_block_stride", "cache_head_stride", "cache_token_stride"), "i32")
    pointers = {"cache_pointer": "*bf16", "block_table_pointer": "*i32"}
    constants = {
        "CACHE_BLOCK": cache_block,
        "HEAD_SIZE": head_size,
        "HEAD_TILE": head_tile,
        "PAGE": page_tokens,
        "BOUNDS": content == "bounds",
        "CODES": False,
        "WIDTH": SummaryKind(page_tokens, content).width(head_size),
    }
    num_warps = summaries_triton.warps(page_tokens, head_tile)
    lengths = dict.fromkeys(("context", "first_page", "pages"), "i32")
    stores = cache_block % page_tokens == 0
    kernels = [
        compile_for_hopper(
            summaries_triton.page_summaries_kernel,
            {**pointers, "summary_pointer": summary, **lengths, **strides},
            {**constants, "STORED": summary != "*fp32"},
            num_warps,
        )
        for summary in (("*fp32", "*bf16", "*fp8e4nv") if stores else ("*fp32",))
    ]
    kernels.append(
        compile_for_hopper(
            summaries_triton.chunk_summaries_kernel,
            {
                **pointers,
                "summary_pointer": "*fp32",
                **dict.fromkeys(("table_row_pointer", "context_pointer"), "*i32"),
                **dict.fromkeys(("pages", "table_row_stride"), "i32"),
                **strides,
            },
            constants,
            num_warps,
        )
    )
    if stores:
        types = {
            **pointers,
            "summary_pointer": "*bf16",
            "context_pointer": "*i32",
            "table_row_stride": "i32",
            **strides,
        }
        kernels.append(compile_for_hopper(summaries_triton.newest_summaries_kernel, types, constants, num_warps))
    for compiled in kernels:
        assert spilled_bytes(compiled, tmp_path) == 0
