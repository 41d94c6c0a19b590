"""StreamingLLM's mask: what is kept is known without looking at a key."""

from __future__ import annotations

import pytest
import torch

from tests import oracle
from tests.methods.lists import SCALE, chunk_allowed, select_chunk
from tests.oracle import PLAIN
from vllm_sparse.config.request import resolve
from vllm_sparse.config.settings import ServerConfig
from vllm_sparse.methods.decode import LayerMemory
from vllm_sparse.methods.knobs import UNBOUNDED_TOKENS
from vllm_sparse.methods.streaming import PAGE_TOKENS, Streaming, StreamingDecode
from vllm_sparse.step.roles import Role


def rounded_down(tokens: int, page: int) -> int:
    return max(tokens, 0) // page * page


def rounded_up(tokens: int, page: int) -> int:
    return -(-tokens // page) * page


def prefill_kept(method: Streaming, chunk: int, context: int, page: int, generator: torch.Generator) -> torch.Tensor:
    """Bool ``[heads, chunk, context]``."""
    data = oracle.random_paged(PLAIN, generator, [context], 2, 32, 64)
    query = oracle.random_tensor(PLAIN, generator, chunk, 4, 32)
    return chunk_allowed(method, select_chunk(method, data, 0, query, page), data, 0, query)


def decode_kept(method: StreamingDecode, context: int, page: int, generator: torch.Generator) -> torch.Tensor:
    """Bool ``[kv_heads, context]``."""
    data = oracle.random_paged(PLAIN, generator, [context], 2, 32, 64)
    query = oracle.random_tensor(PLAIN, generator, 4, 32)
    lists = method.select(query, data.reader(0), SCALE, page, LayerMemory())
    return torch.stack([oracle.kept_positions(lists, row, context) for row in range(2)])


@pytest.mark.parametrize("list_per", ["query_head", "kv_head"])
@pytest.mark.parametrize("query_block", [64, 128])
@pytest.mark.parametrize(("sink", "recent"), [(4, 100), (0, 1), (37, 200), (64, 512)])
@pytest.mark.parametrize(("chunk", "context"), [(1000, 1000), (300, 1000), (1, 700), (129, 641)])
def test_l1_a_prompt_reads_sink_and_window_in_whole_pages(
    sink: int, recent: int, query_block: int, list_per: str, chunk: int, context: int, generator: torch.Generator
) -> None:
    method = Streaming(sink, recent, 0, query_block, list_per)  # type: ignore[arg-type]
    kept = prefill_kept(method, chunk, context, PAGE_TOKENS, generator)
    position = torch.arange(context)
    for query in range(chunk):
        first_query = context - chunk + query // query_block * query_block
        window_start = rounded_down(first_query - (recent - 1), PAGE_TOKENS)
        wanted = (position < rounded_up(sink, PAGE_TOKENS)) | (position >= window_start)
        wanted &= position <= context - chunk + query
        assert torch.equal(kept[:, query], wanted.expand(4, -1)), f"query {query}"


@pytest.mark.parametrize("page", [1, 16, 48, 128])
@pytest.mark.parametrize(("sink", "recent"), [(4, 100), (0, 1), (37, 200), (64, 512)])
def test_l2_a_step_reads_sink_and_window_in_whole_pages(
    sink: int, recent: int, page: int, generator: torch.Generator
) -> None:
    for context in (1, sink + recent, sink + recent + 1, 700, 1001):
        position = torch.arange(context)
        wanted = (position < rounded_up(sink, page)) | (position >= rounded_down(context - recent, page))
        kept = decode_kept(StreamingDecode(sink, recent), context, page, generator)
        assert torch.equal(kept, wanted.expand(2, -1)), f"context {context}"
        if page == 1:
            assert int(kept[0].sum()) == min(context, sink + recent)


def test_l3_sink_and_window_that_hold_the_context_are_dense(generator: torch.Generator) -> None:
    for sink, recent in ((4, 696), (300, 400), (0, 700), (4, 4096)):
        prompt = prefill_kept(Streaming(sink, recent), 700, 700, PAGE_TOKENS, generator)
        assert torch.equal(prompt, oracle.causal_mask(700, 700).expand(4, -1, -1))
        assert bool(decode_kept(StreamingDecode(sink, recent), 700, 1, generator).all())


def test_l4_more_sink_or_window_never_reads_less(generator: torch.Generator) -> None:
    few, more_sink, more_window = Streaming(4, 100), Streaming(80, 100), Streaming(4, 300)
    kept = prefill_kept(few, 500, 1000, PAGE_TOKENS, generator)
    for more in (more_sink, more_window):
        assert bool((prefill_kept(more, 500, 1000, PAGE_TOKENS, generator) | ~kept).all())
        decoding = StreamingDecode(more.sink_tokens, more.recent_tokens)
        newest = decode_kept(StreamingDecode(4, 100), 1000, 1, generator)
        assert bool((decode_kept(decoding, 1000, 1, generator) | ~newest).all())


def test_l5_every_query_reads_at_least_the_papers_mask(generator: torch.Generator) -> None:
    """For every chunking of the prompt."""
    context, position = 1000, torch.arange(1000)
    for chunk in (1000, 777, 128, 1):
        kept = prefill_kept(Streaming(4, 100), chunk, context, PAGE_TOKENS, generator)
        query = torch.arange(context - chunk, context).unsqueeze(1)
        paper = ((position < 4) | (position > query - 100)) & (position <= query)
        assert bool((kept | ~paper).all())


def test_one_list_serves_all_layers() -> None:
    assert StreamingDecode().layer_roles(4) == [Role.WRITE_AND_READ, *[Role.READ] * 3]
    assert StreamingDecode(dense_layers=2).layer_roles(4) == [Role.DENSE, Role.DENSE, Role.WRITE_AND_READ, Role.READ]
    assert StreamingDecode(dense_layers=4).layer_roles(4) == [Role.DENSE] * 4


def test_an_unbounded_window_is_dense() -> None:
    extras = {"sparse_prefill": "streaming", "streaming_recent_tokens": UNBOUNDED_TOKENS}
    assert resolve(extras, ServerConfig(methods=("streaming",)), 8).is_dense
    assert not resolve(
        {**extras, "streaming_recent_tokens": UNBOUNDED_TOKENS - 1}, ServerConfig(methods=("streaming",)), 8
    ).is_dense
