"""What the tests of all methods do with lists: choose them, run them through the stock kernel, check invariants."""

from __future__ import annotations

import itertools

import torch

from tests import oracle
from tests.oracle import Paged, Platform
from vllm_sparse.backend.prefill import PromptChunk, attend_prompt_chunk
from vllm_sparse.kernels.page_list import to_physical
from vllm_sparse.methods.prefill import Layer, PrefillMethod
from vllm_sparse.pages import PageList
from vllm_sparse.step.launch import Executor, Launch

FIRST_LAYER = Layer(0, 0)
SCALE = 0.11
# (chunk, context): whole prompts, chunks that start anywhere, rows of one token, ragged ends.
CHUNKS = [(1, 1), (127, 127), (129, 129), (1000, 1000), (300, 1000), (257, 4099), (1, 700), (129, 641), (512, 1024)]


def draw_block_sizes(platform: Platform, head_size: int, generator: torch.Generator) -> list[int]:
    """The platform's block sizes in random order; a test takes the first few, and all come up over the matrix."""
    sizes = [size for size in (16, 32, 48, 64, 128, 256) if platform.allows(size, head_size)]
    return [sizes[pick] for pick in torch.randperm(len(sizes), generator=generator).tolist()]


class Poisoning(Executor):
    """An executor whose output is NaN where the kernel does not write."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor

    def run(
        self, launch: Launch, query: torch.Tensor, output: torch.Tensor, kv_cache: torch.Tensor, scale: float
    ) -> None:
        output.fill_(oracle.NAN)
        self._executor.run(launch, query, output, kv_cache, scale)


def attend_chunk(
    method: PrefillMethod, lists: PageList, data: Paged, request: int, query: torch.Tensor
) -> torch.Tensor:
    """Run a prefill list through the platform's stock kernel: ``[chunk, heads, head_size]``."""
    executor = Poisoning(data.platform.executor())
    output = torch.full(query.shape, oracle.NAN, dtype=query.dtype, device=query.device)
    table = data.block_table[request]
    attend_prompt_chunk(executor, method, lists, PromptChunk(query, output, data.kv_cache, table, SCALE))
    return output


def attend_newest(lists: PageList, data: Paged, request: int, query: torch.Tensor) -> torch.Tensor:
    """Run a decode list through the platform's stock kernel: ``[heads, head_size]``."""
    rows, heads = lists.pages.shape[0], query.shape[0]
    row_heads = torch.arange(rows, device=query.device) // (rows // data.num_kv_heads)
    table = data.block_table[request].expand(rows, -1)
    pages = to_physical(lists, table, row_heads, data.block_size, data.num_kv_heads)
    starts = torch.arange(rows + 1, dtype=torch.int32, device=query.device)
    launch = Launch(starts, 1, pages, lists.kept_tokens, lists.page_size_tokens)
    grouped = query.view(rows, heads // rows, -1)
    output = torch.full_like(grouped, oracle.NAN)
    data.platform.executor().run(launch, grouped, output, data.kv_cache, SCALE)
    return output.view(heads, -1)


def chunk_allowed(
    method: PrefillMethod, lists: PageList, data: Paged, request: int, query: torch.Tensor
) -> torch.Tensor:
    """Bool ``[heads, chunk, context]``: what a prefill list lets each query read."""
    chunk, heads, _ = query.shape
    context = data.keys[request].shape[1]
    lists = PageList(lists.pages.cpu(), lists.kept_tokens.cpu(), lists.page_size_tokens)
    having = method.list_heads(heads, data.num_kv_heads)
    blocks = -(-chunk // method.query_block_tokens)
    assert lists.pages.shape[0] == having * blocks
    rows = torch.stack([oracle.kept_positions(lists, row, context) for row in range(having * blocks)])
    by_query = rows.view(having, blocks, context).repeat_interleave(method.query_block_tokens, dim=1)[:, :chunk]
    return by_query.repeat_interleave(heads // having, dim=0) & oracle.causal_mask(chunk, context)


def select_chunk(method: PrefillMethod, data: Paged, request: int, query: torch.Tensor, page: int) -> PageList:
    """A method's lists for a chunk of a request, in the model's first layer."""
    return method.select(query, data.reader(request), SCALE, page, FIRST_LAYER)


def check_list(lists: PageList, page: int, context: int, first: int, last: int, row: int, width: int) -> list[int]:
    """The invariants of `PageList` for one row whose queries sit at positions `first` to `last`."""
    live = oracle.live_pages(lists, row)
    where = f"row {row}, queries {first} to {last}: {live}"
    assert live, where
    assert all(low < high for low, high in itertools.pairwise(live)), f"not strictly ascending: {where}"
    assert live[0] >= 0, where
    assert live[-1] == last // page, f"does not end with the newest query's page: {where}"
    own = list(range(first // page, last // page + 1))
    assert live[-len(own) :] == own, f"does not end with its own pages {own}: {where}"
    assert int(lists.kept_tokens[row]) == (len(live) - 1) * page + last % page + 1, where
    entries = lists.pages[row]
    assert int(entries.min()) >= 0, "padding is no valid page"
    assert int(entries.max()) < width, "padding is no valid page"
    return live


def same_lists(first: PageList, second: PageList) -> bool:
    """Equal bit for bit where they are live."""
    rows = range(first.pages.shape[0])
    return bool(torch.equal(first.kept_tokens, second.kept_tokens)) and all(
        oracle.live_pages(first, row) == oracle.live_pages(second, row) for row in rows
    )
