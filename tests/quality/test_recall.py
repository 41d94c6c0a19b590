"""Recall of variants on the bundled model, against a float64 softmax over whole rows."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch

from tests import oracle
from tests.methods.lists import SCALE
from tests.serving.server import prompt_of
from vllm_sparse.calibration.model import observe
from vllm_sparse.config.messages import SparseParamsError
from vllm_sparse.keys import plain_keys
from vllm_sparse.methods.decode import LayerMemory
from vllm_sparse.methods.dhsa import Dhsa
from vllm_sparse.methods.prefill import Layer
from vllm_sparse.methods.tidal import Tidal
from vllm_sparse.pages import page_mask
from vllm_sparse.quality.measures.recall import (
    DECODE_POSITIONS,
    DECODE_SPACING_TOKENS,
    measure_recall,
    prompt_mass,
    step_mass,
)
from vllm_sparse.quality.records import RecallRecord
from vllm_sparse.quality.variants import Variant
from vllm_sparse.step.roles import Role

MODEL = str(Path(__file__).parents[2] / "loadtest" / "model" / "weights")
LAYERS, HEADS, KV_HEADS = 8, 4, 2
# The second prompt chunk begins at a multiple of query blocks; the last query block is short.
CHUNK = 512
NOTHING_FORCED = {"sink_tokens": 0, "recent_tokens": 0}


def both(name: str, density: float, budget_tokens: int) -> Variant:
    """A baseline in both phases, with nothing forced but a query's own page."""
    extras = {f"{name}_{knob}": value for knob, value in NOTHING_FORCED.items()}
    sizes = {f"{name}_density": density, f"{name}_budget_tokens": budget_tokens}
    return Variant(name, {"sparse_prefill": name, "sparse_decode": name, **sizes, **extras}, name)


VARIANTS = (
    Variant("dense", {}),
    both("oracle", 0.2, 128),
    both("random", 0.2, 128),
    Variant(
        "dhsa and tidal",
        {
            "sparse_prefill": "dhsa",
            "dhsa_density": 0.25,
            "dhsa_dense_layers": 1,
            "sparse_decode": "tidal",
            "tidal_budget_tokens": 128,
        },
    ),
)


@functools.cache
def tokens_of(seed: int, count: int) -> tuple[int, ...]:
    from transformers import AutoTokenizer

    tokens: list[int] = AutoTokenizer.from_pretrained(MODEL)(prompt_of(seed, 1200).content)["input_ids"]
    assert len(tokens) >= count
    return tuple(tokens[:count])


@pytest.fixture(scope="module")
def records() -> list[RecallRecord]:
    texts = [(7, "prose", list(tokens_of(1, 1000))), (8, "code", list(tokens_of(2, 900)))]
    return list(measure_recall(MODEL, VARIANTS, texts, 1024, "cpu", 0, CHUNK))


def record_of(records: list[RecallRecord], phase: str, variant: str, document: int = 7) -> RecallRecord:
    (found,) = [
        record for record in records if (record.phase, record.variant, record.document) == (phase, variant, document)
    ]
    return found


def test_records_are_of_each_text_and_sparse_phase(records: list[RecallRecord]) -> None:
    sparse = [(phase, variant.name) for phase in ("prefill", "decode") for variant in VARIANTS[1:]]
    for document, kind in ((7, "prose"), (8, "code")):
        own = [record for record in records if record.document == document]
        assert sorted((record.phase, record.variant) for record in own) == sorted(sparse)
        assert {(record.kind, record.length_tokens) for record in own} == {(kind, 1024)}
    for record in records:
        assert torch.tensor(record.recall).shape == torch.tensor(record.best).shape == (LAYERS, HEADS)
        assert len(record.density) == LAYERS
    assert {record.document for record in records[: len(sparse)]} == {7}, "a text's records come before the next text"


def test_layers_that_are_dense_keep_everything(records: list[RecallRecord]) -> None:
    prompt = record_of(records, "prefill", "dhsa and tidal")
    step = record_of(records, "decode", "dhsa and tidal")
    roles = Tidal(budget_tokens=128).layer_roles(LAYERS)
    dense = [layer for layer, role in enumerate(roles) if role.reads_everything]
    assert dense
    for record, layers in ((prompt, [0]), (step, dense)):
        for layer in range(LAYERS):
            whole = record.recall[layer] == record.best[layer] == (1.0,) * HEADS and record.density[layer] == 1
            assert whole == (layer in layers), f"{record.phase}, layer {layer}"


@pytest.mark.parametrize("document", [7, 8])
def test_oracle_is_the_best_list_and_random_is_not(records: list[RecallRecord], document: int) -> None:
    for phase in ("prefill", "decode"):
        known, drawn = (torch.tensor(record_of(records, phase, name, document).recall) for name in ("oracle", "random"))
        best, best_drawn = (
            torch.tensor(record_of(records, phase, name, document).best) for name in ("oracle", "random")
        )
        assert bool((known <= best + 1e-5).all())
        assert bool((drawn <= best_drawn + 1e-5).all())
        if phase == "prefill":
            assert torch.allclose(best, best_drawn, atol=1e-5), "lists of equal length"
            assert torch.allclose(known, best, atol=1e-5), "a list per query head"
        # Of a short prompt, a query block's own tokens, which both read, hold most of the attention.
        assert float(known.mean() - drawn.mean()) > {"prefill": 0.02, "decode": 0.1}[phase]
        assert bool((known.mean(1) > drawn.mean(1) - 1e-5).all())
    densities = [record_of(records, "prefill", name, document).density for name in ("oracle", "random")]
    assert densities[0] == pytest.approx(densities[1], abs=1e-6)
    assert all(0.15 < density < 0.25 for density in densities[0]), "of own pages, on average half is in reach"


def observed(tokens: tuple[int, ...]) -> list[tuple[torch.Tensor, torch.Tensor, float]]:
    """Queries, keys and scale of each layer."""
    layers = []

    def keep(layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> str:
        layers.append((query.clone(), key.clone(), scale))
        return ""

    observe(MODEL, [list(tokens)], "cpu", keep)
    return layers


def test_recall_equals_a_float64_softmax(records: list[RecallRecord]) -> None:
    """Of lists that the methods choose here once more: prompt chunk by prompt chunk, and step by step."""
    tokens = tokens_of(1, 1000)
    count = len(tokens)
    dhsa, tidal = Dhsa(density=0.25, dense_layers=1), Tidal(budget_tokens=128)
    roles = tidal.layer_roles(LAYERS)
    prompt, step = (record_of(records, phase, "dhsa and tidal") for phase in ("prefill", "decode"))
    contexts = [count - DECODE_SPACING_TOKENS * position for position in range(DECODE_POSITIONS)]
    lists: dict[int, torch.Tensor] = {}
    causal = oracle.causal_mask(count, count)
    for layer, (query, key, scale) in enumerate(observed(tokens)):
        if layer == 0:
            continue
        weight = oracle.probabilities(query.transpose(0, 1), key, scale, causal)
        kept = torch.zeros(HEADS, count, count, dtype=torch.bool)
        for start in range(0, count, CHUNK):
            stop = min(start + CHUNK, count)
            chosen = dhsa.select(
                query[:, start:stop].transpose(0, 1), plain_keys(key[:, :stop]), scale, 32, Layer(layer, 0, count)
            )
            pages = page_mask(chosen, -(-count // 32)).view(HEADS, -1, -(-count // 32))
            by_query = pages.repeat_interleave(128, dim=1)[:, : stop - start]
            kept[:, start:stop] = by_query.repeat_interleave(32, dim=2)[..., :count]
        kept &= causal
        assert prompt.recall[layer] == pytest.approx((weight * kept).sum((1, 2)).div(count).tolist(), abs=1e-4)
        assert prompt.density[layer] == pytest.approx(float(kept.sum() / causal.sum() / HEADS), abs=1e-5)
        recalls = []
        for context in contexts:
            if roles[layer].writes_list:
                chosen = tidal.select(query[:, context - 1], plain_keys(key[:, :context]), scale, 1, LayerMemory())
                lists[context] = page_mask(chosen, context).repeat_interleave(HEADS // KV_HEADS, dim=0)
            if roles[layer] is Role.READ:
                row = weight[:, context - 1, :context]
                recalls.append((row * lists[context]).sum(1))
        if recalls:
            assert step.recall[layer] == pytest.approx(torch.stack(recalls).mean(0).tolist(), abs=1e-4)
            density = sum(128 / context for context in contexts) / len(contexts)
            assert step.density[layer] == pytest.approx(density, abs=1e-5)


@pytest.mark.parametrize("page", [16, 32, 128])
def test_the_best_list_is_found_by_trying_all(page: int, generator: torch.Generator) -> None:
    """For each query block: its own pages, then those of the largest sums, as many as the list holds."""
    tokens, block = 601, 128
    query = oracle.random_tensor(oracle.PLAIN, generator, HEADS, tokens, 32, spread=3)
    key = oracle.random_tensor(oracle.PLAIN, generator, KV_HEADS, tokens, 32)
    weight = oracle.probabilities(query.transpose(0, 1), key, SCALE, oracle.causal_mask(tokens, tokens))
    pages = -(-tokens // page)
    padded = torch.nn.functional.pad(weight, (0, pages * page - tokens)).view(HEADS, tokens, pages, page).sum(3)
    listed = torch.rand(HEADS, -(-tokens // block), pages, generator=generator) < 0.4
    expected = torch.zeros(HEADS, dtype=torch.double)
    for row, first in enumerate(range(0, tokens, block)):
        stop = min(first + block, tokens)
        own = set(range(first // page, (stop - 1) // page + 1))
        listed[:, row, min(own) : max(own) + 1] = True
        # What lies in the future does not count.
        in_reach = range(max(own) + 1)
        for head in range(HEADS):
            mass = padded[head, first:stop].sum(0).tolist()
            length = int(listed[head, row, : len(in_reach)].sum())
            others = sorted((mass[number] for number in in_reach if number not in own), reverse=True)
            expected[head] += sum(mass[number] for number in own) + sum(others[: length - len(own)])
    found = prompt_mass(query, key, SCALE, block, page).kept_by(listed)
    assert found.best.tolist() == pytest.approx((expected / tokens).tolist(), abs=1e-5)
    assert bool((found.recall <= found.best + 1e-6).all())
    last = step_mass(query, key, SCALE).kept_by(torch.ones(KV_HEADS, 1, tokens, dtype=torch.bool))
    assert last.recall.tolist() == last.best.tolist() == pytest.approx([1.0] * HEADS)


def test_short_texts_run_dense() -> None:
    """Below `min_tokens`, which a variant may set itself."""
    text = [(1, "prose", list(tokens_of(1, 300)))]
    bold = Variant("bold", {**VARIANTS[1].extras, "sparse_min_tokens": 0})
    shy, measured = VARIANTS[1], list(measure_recall(MODEL, [VARIANTS[1], bold], text, 512, "cpu", 400, CHUNK))
    for phase in ("prefill", "decode"):
        dense = record_of(measured, phase, shy.name, 1)
        assert dense.recall == dense.best == ((1.0,) * HEADS,) * LAYERS
        assert set(dense.density) == {1.0}
        assert min(record_of(measured, phase, bold.name, 1).density) < 0.9


def test_wrong_settings_are_named() -> None:
    with pytest.raises(SparseParamsError, match="sale_tua"):
        list(measure_recall(MODEL, [Variant("x", {"sparse_prefill": "sale", "sale_tua": 1})], [], 8, "cpu", 0, CHUNK))
    with pytest.raises(ValueError, match="chunk_tokens is 100; a multiple of 128"):
        list(measure_recall(MODEL, [], [], 8, "cpu", 0, 100))


def test_oracle_decodes_with_the_best_list_of_its_kv_head(records: list[RecallRecord]) -> None:
    """The sum over a KV head's query heads is what no list of equal length exceeds."""
    tokens = tokens_of(1, 1000)
    record = record_of(records, "decode", "oracle")
    contexts = [len(tokens) - DECODE_SPACING_TOKENS * position for position in range(DECODE_POSITIONS)]
    for layer, (query, key, scale) in enumerate(observed(tokens)):
        best = torch.zeros(KV_HEADS, dtype=torch.double)
        for context in contexts:
            everything = torch.ones(context, dtype=torch.bool)
            newest = query[:, context - 1].unsqueeze(0)
            weight = oracle.probabilities(newest, key[:, :context], scale, everything)[:, 0]
            merged = weight.view(KV_HEADS, -1, context).mean(1)
            others = merged[:, :-1].topk(127, dim=1).values.sum(1)
            best += (merged[:, -1] + others) / len(contexts)
        kept = torch.tensor(record.recall[layer]).view(KV_HEADS, -1).mean(1)
        assert kept.tolist() == pytest.approx(best.tolist(), abs=1e-4)
