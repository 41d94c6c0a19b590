"""What a page says, read back from its HTML, against the methods' lists and a float64 softmax."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import dataclass
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests import oracle
from tests.oracle import Paged
from vllm_sparse.inspect.kept import MOST_CELLS, DecodeInspection, KeptLayer, KeptMap, PromptInspection
from vllm_sparse.inspect.page import Inspected, render, strip_picture
from vllm_sparse.methods.block_topk import BlockTopk
from vllm_sparse.methods.decode import LayerMemory
from vllm_sparse.methods.dhsa import Dhsa
from vllm_sparse.methods.flexprefill import FlexPrefill
from vllm_sparse.methods.hip import Hip
from vllm_sparse.methods.prefill import Layer, PrefillMethod
from vllm_sparse.methods.sale import Sale
from vllm_sparse.methods.tidal import Tidal
from vllm_sparse.step.roles import Role

NO_NOTES = {"prefill": "", "decode": ""}
WORDS, MARKS = [" a", " b<", " c", " d"], [(1, 3)]
HEADS, KV_HEADS, HEAD_SIZE, SCALE = 4, 2, 32, 0.2

METHODS = [
    FlexPrefill(gamma=0.1, min_budget_tokens=128, dense_layers=1),
    FlexPrefill(gamma=0.05, min_budget_tokens=128, divergence_threshold=0, list_per="kv_head", query_block_tokens=64),
    Sale(tau=8),
    Dhsa(density=0.3),
    Hip(
        stage_block_tokens=(64, 16),
        stage_budget_tokens=(256, 64),
        query_stride=(4, 4),
        sink_tokens=32,
        recent_tokens=64,
        dense_tail_tokens=0,
    ),
]


@dataclass
class Figure:
    """One head's figure.

    Attributes:
        data: the figure's attributes of this kind.
        pixels: of its picture, int64 ``[rows, columns, 3]``.
    """

    data: dict[str, str]
    pixels: torch.Tensor

    @property
    def read(self) -> torch.Tensor:
        """Blue cells: bool ``[rows, columns]``."""
        return self.pixels[..., 2] > self.pixels[..., 0]

    @property
    def future(self) -> torch.Tensor:
        """Grey cells."""
        return (self.pixels == 236).all(-1)


class PageReader(HTMLParser):
    """Figures of heads by phase, layer and head; and every address that the page names."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.figures: dict[tuple[str, int, int], Figure] = {}
        self.addresses: list[str] = []
        self._data: dict[str, str] = {}
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.addresses += [given[name] for name in ("src", "href") if name in given]
        if tag == "figure":
            self._data = {name: value for name, value in given.items() if name.startswith("data-")}
        if tag == "img":
            content = base64.b64decode(given["src"].removeprefix("data:image/png;base64,"))
            picture = Image.open(io.BytesIO(content)).convert("RGB")
            pixels = torch.from_numpy(np.array(picture)).long()
            place = self._data["data-phase"], int(self._data["data-layer"]), int(self._data["data-head"])
            self.figures[place] = Figure(self._data, pixels)


def page_of(prefill: list[KeptLayer] | None, decode: list[KeptLayer] | None) -> PageReader:
    notes = {"prefill": "a <note>", "decode": "another"}
    return PageReader(
        render(Inspected("title & <more>", {"prompt": "<script>"}, prefill, decode, notes, True, WORDS, MARKS))
    )


def inputs(tokens: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Query ``[heads, tokens, size]`` and keys; queries that find some keys, so that methods leave others out."""
    query = torch.randn(HEADS, tokens, HEAD_SIZE, generator=generator) * 3
    return query, torch.randn(KV_HEADS, tokens, HEAD_SIZE, generator=generator)


def listed(
    method: PrefillMethod, query: torch.Tensor, key: torch.Tensor, chunk: int, generator: torch.Generator
) -> torch.Tensor:
    """Tokens that each query reads: bool ``[heads, tokens, tokens]``, from a cache on blocks in random order."""
    tokens = query.shape[1]
    kept = torch.zeros(HEADS, tokens, tokens, dtype=torch.bool)
    for start in range(0, tokens, chunk):
        stop = min(start + chunk, tokens)
        if stop - start < method.min_query_tokens:
            kept[:, start:stop] = True
            continue
        data: Paged = oracle.paged(oracle.PLAIN, [key[:, :stop]], [key[:, :stop]], 128, generator)
        chunk_query = query[:, start:stop].transpose(0, 1)
        lists = method.select(chunk_query, data.reader(0), SCALE, method.page_tokens, Layer(1, 0, tokens))
        having = method.list_heads(HEADS, KV_HEADS)
        blocks = -(-(stop - start) // method.query_block_tokens)
        for head in range(HEADS):
            for block in range(blocks):
                row = (head * having // HEADS) * blocks + block
                first = start + block * method.query_block_tokens
                last = min(first + method.query_block_tokens, stop)
                # Pages are read as a whole, what a row may see of them is causal.
                pages = oracle.live_pages(lists, row)
                for page in pages:
                    kept[head, first:last, page * method.page_tokens : (page + 1) * method.page_tokens] = True
    return kept & oracle.causal_mask(tokens, tokens)


@pytest.mark.parametrize("method", METHODS, ids=repr)
# Long enough that columns and diagonals of two heads do not cover it by chance.
@pytest.mark.parametrize(("tokens", "chunk"), [(1405, 4096), (1400, 384)])
def test_a_prompts_page_is_what_was_kept(
    method: PrefillMethod, tokens: int, chunk: int, generator: torch.Generator
) -> None:
    """Density, recall and each cell's colour of each head; the last chunk is too short for some methods."""
    query, key = inputs(tokens, generator)
    inspection = PromptInspection(method, 0, chunk, True)
    layers = [inspection.observe(index, query, key, SCALE) for index in range(2)]
    page = page_of(layers, None)
    kept = listed(method, query, key, chunk, generator)
    causal = oracle.causal_mask(tokens, tokens)
    weight = oracle.probabilities(query.transpose(0, 1), key, SCALE, causal)
    shown = [layer for layer in range(2) if layer >= method.dense_layers]
    assert sorted(page.figures) == [("prefill", layer, head) for layer in shown for head in range(HEADS)]
    for head in range(HEADS):
        figure = page.figures["prefill", 1, head]
        assert float(figure.data["data-density"]) == pytest.approx(float(kept[head].sum() / causal.sum()), abs=1e-5)
        recall = float((weight[head] * kept[head]).sum(1).mean())
        assert float(figure.data["data-recall"]) == pytest.approx(recall, abs=1e-4)
        assert torch.equal(figure.read, cells(kept[head], method))
        assert torch.equal(figure.future, ~cells(causal, method))
    densities = [float(page.figures["prefill", 1, head].data["data-density"]) for head in range(HEADS)]
    assert min(densities) < 0.98, "the methods must leave something out for this test to say anything"


def cells(tokens: torch.Tensor, method: PrefillMethod) -> torch.Tensor:
    """Whether a query block reads any token of a page: bool ``[blocks, pages]``."""
    rows, columns = tokens.shape
    padded = torch.nn.functional.pad(tokens, (0, -columns % method.page_tokens, 0, -rows % method.query_block_tokens))
    blocks, pages = -(-rows // method.query_block_tokens), -(-columns // method.page_tokens)
    return padded.view(blocks, method.query_block_tokens, pages, method.page_tokens).any(3).any(1)


def test_darker_cells_have_more_attention(generator: torch.Generator) -> None:
    """Both of what was read and of what was missed."""
    query, key = inputs(1024, generator)
    method = FlexPrefill(gamma=0.1, min_budget_tokens=128, divergence_threshold=0)
    page = page_of([PromptInspection(method, 0, 4096, True).observe(0, query, key, SCALE)], None)
    weight = oracle.probabilities(query.transpose(0, 1), key, SCALE, oracle.causal_mask(1024, 1024))
    mass = weight.view(HEADS, 8, 128, 8, 128).sum(4).mean(2)
    for head in range(HEADS):
        figure = page.figures["prefill", 0, head]
        for group in (figure.read, ~figure.read & ~figure.future):
            brightness = figure.pixels.sum(-1)[group]
            ordered = brightness[mass[head][group].argsort()]
            # Masses that are nearly equal may be in another order in float64.
            assert bool((ordered.diff() <= 3).all())
            assert len(set(ordered.tolist())) > 3


DECODE_METHODS: list[tuple[Any, list[Role]]] = [
    (
        Tidal(budget_tokens=64, sink_tokens=4, recent_tokens=8, dense_layers=1),
        [Role.DENSE, Role.DENSE_AND_WRITE, Role.READ, Role.READ],
    ),
    (
        Tidal(budget_tokens=96, list_per="query_head", selection_reads="list", dense_layers=0),
        [Role.WRITE_AND_READ, Role.READ, Role.READ, Role.WRITE_AND_READ],
    ),
    (BlockTopk(budget_tokens=96, dense_layers=2), [Role.DENSE, Role.DENSE, Role.WRITE_AND_READ, Role.WRITE_AND_READ]),
]


@pytest.mark.parametrize(("method", "roles"), DECODE_METHODS, ids=str)
def test_a_decode_steps_page_is_what_was_kept(method: Any, roles: list[Role], generator: torch.Generator) -> None:
    """Layers differ, so that a reused list is not the layer's own."""
    tokens = 250
    inspection = DecodeInspection(method, roles)
    layers, expected, attention = [], {}, {}
    for index, role in enumerate(roles):
        query, key = inputs(tokens, generator)
        layers.append(inspection.observe(index, query, key, SCALE))
        if role.writes_list:
            data = oracle.paged(oracle.PLAIN, [key], [key], 16, generator)
            lists = method.select(query[:, -1], data.reader(0), SCALE, 1, LayerMemory())
            rows = torch.stack([oracle.kept_positions(lists, row, tokens) for row in range(len(lists.pages))])
            last = rows.repeat_interleave(HEADS // len(rows), dim=0)
        if role is not Role.DENSE:
            expected[index] = last
            whole = torch.ones(tokens, dtype=torch.bool)
            attention[index] = oracle.probabilities(query[:, -1].unsqueeze(0), key, SCALE, whole)[:, 0]
    page = page_of(None, layers)
    assert sorted(page.figures) == [("decode", layer, head) for layer in expected for head in range(HEADS)]
    for (_, layer, head), figure in page.figures.items():
        kept = expected[layer][head]
        assert float(figure.data["data-density"]) == pytest.approx(float(kept.float().mean()), abs=1e-5)
        recall = float(attention[layer][head][kept].sum())
        assert float(figure.data["data-recall"]) == pytest.approx(recall, abs=1e-4)
        assert figure.pixels.shape == (2, tokens, 3)
        assert torch.equal(figure.read[0], kept)
        # Below: nothing where it was read, orange where attention was missed.
        assert bool((figure.pixels[1][kept] == 255).all())
        missed = attention[layer][head] * ~kept
        # A share of less than 1e-4 is white.
        assert missed.max() < 2e-4 or int(figure.pixels[1][missed.argmax()].sum()) < 3 * 255


def test_a_long_prompt_is_shrunk_and_its_numbers_are_not(generator: torch.Generator) -> None:
    """And without the true attention there are densities alone."""
    method = Hip(
        stage_block_tokens=(64, 16),
        stage_budget_tokens=(512, 128),
        query_stride=(4, 4),
        sink_tokens=32,
        recent_tokens=64,
    )
    tokens = MOST_CELLS * method.page_tokens + 300
    query, key = inputs(tokens, generator)
    shrunk = page_of([PromptInspection(method, 0, 8192, False).observe(0, query, key, SCALE)], None)
    compared = page_of([PromptInspection(method, 0, 8192, True).observe(0, query, key, SCALE)], None)
    kept = listed(method, query, key, 8192, generator)
    for head in range(HEADS):
        figure = shrunk.figures["prefill", 0, head]
        # Two pages a column, the first of which is read by all.
        assert figure.pixels.shape[:2] == (
            -(-tokens // method.query_block_tokens),
            -(-tokens // method.page_tokens // 2),
        )
        assert bool(figure.read[:, 0].all())
        expected = float(kept[head].sum() / (tokens * (tokens + 1) / 2))
        assert float(figure.data["data-density"]) == pytest.approx(expected, abs=1e-5)
        assert "data-recall" not in figure.data
        # As many cells have the colour of their attention as have any at all.
        with_attention = compared.figures["prefill", 0, head]
        assert torch.equal(with_attention.future, figure.future)
        assert float(with_attention.data["data-density"]) == pytest.approx(expected, abs=1e-5)


def test_a_page_needs_nothing_from_elsewhere(generator: torch.Generator) -> None:
    query, key = inputs(600, generator)
    layer = PromptInspection(FlexPrefill(gamma=0.4, min_budget_tokens=128), 0, 4096, True).observe(0, query, key, SCALE)
    text = render(Inspected("t", {"prompt": "<script>alert(1)</script>"}, [layer], None, NO_NOTES, True, WORDS))
    page = PageReader(text)
    assert page.addresses
    assert all(address.startswith(("data:image/png;base64,", "#")) for address in page.addresses)
    assert "<script" not in text
    assert not re.search(r"@import|url\(|https?:", text)
    linked = {address[1:] for address in page.addresses if address.startswith("#")}
    assert all(f'id="{place}"' in text for place in linked)


def test_a_verdict_names_the_worst_head() -> None:
    def head(density: float, recall: float | None) -> KeptMap:
        cell = torch.ones(1, 1)
        return KeptMap(cell, cell, cell, density, recall)

    prompt = [KeptLayer(1, "sparse", [head(0.2, 0.9), head(0.4, 0.8)]), KeptLayer(2, "sparse", [head(0.6, 1.0)] * 2)]
    notes = NO_NOTES
    page = render(Inspected("t", {}, prompt, None, notes, True, WORDS))
    verdict = page.partition('class="verdict">')[2].partition("</p>")[0]
    assert re.sub("<[^>]+>", "", verdict) == (
        "Prompt: 92.5% of the attention was kept with 45.0% of the tokens. The worst is layer 1, head 1: it kept 80.0% "
        "with 40.0%."
    )
    assert 'href="#prefill1"' in verdict
    shades = re.findall(r'head \d: [\d.]+</title><rect [^>]+fill="rgb\((\d+) (\d+) (\d+)\)"', page)[4:]
    darkness = [-sum(map(int, shade)) for shade in shades]
    assert darkness[1] > darkness[0] > darkness[2], "by what is lost"
    assert sum(map(int, shades[2])) > 3 * 250, "nothing lost is white"
    unknown = [KeptLayer(1, "sparse", [head(0.2, None)])]
    assert 'class="verdict"' not in render(Inspected("t", {}, unknown, None, notes, False, WORDS))


def test_a_pointer_shows_tokens_and_marks_stand_over_every_picture(generator: torch.Generator) -> None:
    query, key = inputs(600, generator)
    layer = PromptInspection(FlexPrefill(gamma=0.4, min_budget_tokens=128), 0, 4096, True).observe(0, query, key, SCALE)
    words = [f" w{number}<" for number in range(600)]
    page = render(Inspected("t", {}, [layer], None, NO_NOTES, True, words, [(300, 302)]))
    rects = re.findall(r'<rect( class="mark")? x="(\d+)" y="0" width="(\d+)" height="1"><title>([^<]*)</title>', page)
    shown = [(int(x), int(width)) for mark, x, width, _ in rects if not mark]
    assert len(shown) == 64
    assert [x for x, _ in shown] == [0, *(x + width for x, width in shown)][:64]
    assert sum(width for _, width in shown) == 600
    assert rects[0][3].startswith("keys 0 to 8: w0&lt; w1&lt;")
    (marked,) = [rect for rect in rects if rect[0]]
    assert marked[1:] == ("300", "2", "keys 300 to 301: w300&lt; w301&lt;")
    assert page.count('href="#keys"') == HEADS
    assert page.count('style="width: 93.75%"') == 2 * HEADS, "600 of the 640 tokens of five pages"
    assert page.count("<span>0</span><span>150</span><span>300</span><span>450</span><span>600</span>") == HEADS


def test_few_tokens_of_a_long_contexts_cell_are_pale() -> None:
    """Not as if all of them had been read."""
    mass = torch.tensor([[1e-2, 1e-2, 1e-2, 0.0]])
    kept = KeptMap(torch.tensor([[1.0, 0.3, 0.01, 0.0]]), mass, torch.zeros(1, 4), 0.3, 0.9)
    brightness = strip_picture(kept)[0].long().sum(-1).tolist()
    assert brightness[0] < brightness[1] < brightness[2] < brightness[3] == 3 * 255
