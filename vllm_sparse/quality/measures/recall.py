"""Attention mass that settings keep of real texts, against the best list of equal length; the model runs in process.

Every layer sees the inputs that dense attention gives it, so that layers do not depend on one another: what is measured
is the choice alone, not what comes of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from vllm_sparse.calibration.model import full_layers, observe_each, text_config
from vllm_sparse.config.names import METHODS
from vllm_sparse.config.request import SparseParams, resolve
from vllm_sparse.config.server import parse_server_config
from vllm_sparse.inspect.kept import (
    CHUNK_UNIT_TOKENS,
    DecodeInspection,
    PromptInspection,
    newest_mass,
    tokens_in_reach,
)
from vllm_sparse.kernels.block_mass import block_mass
from vllm_sparse.keys import plain_keys
from vllm_sparse.quality.records import RecallRecord
from vllm_sparse.quality.variants import Variant
from vllm_sparse.step.eligibility import why_decode_is_dense

# Decoding is measured at some of a text's last tokens, as if each had just been generated: at so many, so far apart.
DECODE_POSITIONS, DECODE_SPACING_TOKENS = 8, 64
# A millionth is far below what differs between texts.
DIGITS = 6


def measure_recall(
    model: str,
    variants: Sequence[Variant],
    texts: Sequence[tuple[int, str, list[int]]],
    length_tokens: int,
    device: str,
    min_tokens: int,
    chunk_tokens: int,
) -> Iterator[RecallRecord]:
    """Measure the recall of variants; the model runs once over each text, with dense attention.

    Args:
        model: name or folder, as transformers loads it.
        variants: settings; those that leave a phase dense have no record of it.
        texts: number of the document, its kind, and its token ids.
        length_tokens: as of the records.
        device: where the model runs.
        min_tokens: prompt chunks and decode steps whose context is shorter run dense, unless a variant says otherwise.
        chunk_tokens: prompts are computed in chunks of this size.

    Yields:
        The records of a text, phase by phase and variant by variant, before the model runs over the next one.

    Raises:
        ValueError: `chunk_tokens` is no multiple of 128, or a variant's settings are wrong (`SparseParamsError`),
            or the model has layers that are not computed (`full_layers`).
    """
    if chunk_tokens < CHUNK_UNIT_TOKENS or chunk_tokens % CHUNK_UNIT_TOKENS:
        raise ValueError(f"chunk_tokens is {chunk_tokens}; a multiple of {CHUNK_UNIT_TOKENS} is allowed")
    config = text_config(model)
    layers = len(full_layers(config))
    settings = {"sparse": {"methods": list(METHODS), "min_tokens": min_tokens}}
    server = parse_server_config(settings, layers, config.num_attention_heads)
    params = [(variant.name, resolve(variant.extras, server, layers, length_tokens)) for variant in variants]
    measured = TextRecall([], layers, chunk_tokens)

    def observe(layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> str:
        nonlocal measured
        if layer == 0:
            measured = TextRecall(params, layers, chunk_tokens)
        measured.observe(layer, query, key, scale)
        return ""

    runs = observe_each(model, [tokens for _, _, tokens in texts], device, observe)
    for (document, kind, _), _ in zip(texts, runs, strict=True):
        for phase, name, found in measured.found:
            yield RecallRecord(
                name, length_tokens, kind, document, phase, tuple(found.recall), tuple(found.best), tuple(found.density)
            )


@dataclass(frozen=True)
class LayerRecall:
    """What lists keep in one layer, on the CPU.

    Attributes:
        recall: double ``[query_heads]`` share of the attention mass that was kept, mean over queries.
        best: likewise, by the best lists of equal length.
        density: double, of no dimension: tokens read over tokens in reach, mean over heads.
    """

    recall: torch.Tensor
    best: torch.Tensor
    density: torch.Tensor

    @classmethod
    def dense(cls, heads: int) -> LayerRecall:
        """Of a layer that reads everything."""
        ones = torch.ones(heads, dtype=torch.double)
        return cls(ones, ones, ones[0])

    @classmethod
    def mean(cls, measured: Sequence[LayerRecall]) -> LayerRecall:
        """Of several steps in the same layer."""
        return cls(
            torch.stack([step.recall for step in measured]).mean(0),
            torch.stack([step.best for step in measured]).mean(0),
            torch.stack([step.density for step in measured]).mean(),
        )


@dataclass
class Recall:
    """A variant's recall in one phase of a text, layer by layer; attributes as of `RecallRecord`."""

    recall: list[tuple[float, ...]] = field(default_factory=list)
    best: list[tuple[float, ...]] = field(default_factory=list)
    density: list[float] = field(default_factory=list)

    def add(self, layer: LayerRecall) -> None:
        """The next layer's."""
        self.recall.append(tuple(round(share, DIGITS) for share in layer.recall.tolist()))
        self.best.append(tuple(round(share, DIGITS) for share in layer.best.tolist()))
        self.density.append(round(float(layer.density), DIGITS))


class Mass:
    """The true attention of rows to pages, and what the best lists of any length keep of it.

    Args:
        mass: ``[query_heads, rows, pages]`` summed over each row's queries.
        own: bool ``[rows, pages]`` pages with positions of the row's own queries, which every list holds.
        reach: double ``[rows, pages]`` tokens in reach, summed over each row's queries.
        queries: of all rows together.
    """

    def __init__(self, mass: torch.Tensor, own: torch.Tensor, reach: torch.Tensor, queries: int) -> None:
        self._mass = mass.double()
        self._reach = reach
        self._queries = queries
        order = self._mass.masked_fill(own, float("inf")).argsort(dim=2, descending=True)
        self._best = self._mass.gather(2, order).cumsum(2)

    def kept_by(self, listed: torch.Tensor) -> LayerRecall:
        """What lists keep.

        Args:
            listed: bool ``[lists' heads, rows, pages]`` pages of each list, some perhaps out of reach.
        """
        heads = self._mass.shape[0]
        kept = listed & (self._reach > 0)
        density = (kept * self._reach).sum() / (self._reach.sum() * kept.shape[0])
        kept = kept.repeat_interleave(heads // kept.shape[0], dim=0)
        best = self._best.gather(2, kept.sum(2, keepdim=True) - 1)
        recall = (self._mass * kept).sum((1, 2))
        return LayerRecall((recall / self._queries).cpu(), (best.sum((1, 2)) / self._queries).cpu(), density.cpu())


def prompt_mass(query: torch.Tensor, key: torch.Tensor, scale: float, block: int, page: int) -> Mass:
    """True attention of the query blocks of a prompt.

    Args:
        query: ``[query_heads, tokens, head_size]``, rotary positions applied.
        key: ``[kv_heads, tokens, head_size]``, likewise.
        scale: softmax scale.
        block: query tokens of a query block.
        page: tokens of a page.
    """
    tokens = key.shape[1]
    mass = block_mass(query.transpose(0, 1), plain_keys(key), scale, block, page)
    first_query = torch.arange(0, tokens, block, device=key.device).unsqueeze(1)
    last_query = (first_query + block - 1).clamp(max=tokens - 1)
    pages = torch.arange(mass.shape[2], device=key.device)
    own = (pages >= first_query // page) & (pages <= last_query // page)
    return Mass(mass, own, tokens_in_reach(tokens, block, page, key.device), tokens)


def step_mass(query: torch.Tensor, key: torch.Tensor, scale: float) -> Mass:
    """True attention of the last query, in pages of one token; arguments as in `prompt_mass`."""
    own = torch.arange(key.shape[1], device=key.device).unsqueeze(0) == key.shape[1] - 1
    reach = torch.ones(own.shape, dtype=torch.double, device=key.device)
    return Mass(newest_mass(query, key, scale).unsqueeze(1), own, reach, 1)


class TextRecall:
    """Recall of variants over one text.

    Args:
        params: name and settings of each variant.
        layers: of the model.
        chunk_tokens: as in `measure_recall`.

    Attributes:
        found: phase, variant and recall, of each variant that is sparse in the phase.
    """

    def __init__(self, params: Sequence[tuple[str, SparseParams]], layers: int, chunk_tokens: int) -> None:
        self._prompts: list[tuple[PromptInspection, Recall]] = []
        self._steps: list[tuple[SparseParams, list[DecodeInspection], Recall]] = []
        self.found: list[tuple[Literal["prefill", "decode"], str, Recall]] = []
        for name, settings in params:
            if settings.prefill is not None:
                inspection = PromptInspection(settings.prefill, settings.min_tokens, chunk_tokens, False)
                self._prompts.append((inspection, Recall()))
                self.found.append(("prefill", name, self._prompts[-1][1]))
            if settings.decode is not None:
                roles = settings.decode.layer_roles(layers)
                steps = [DecodeInspection(settings.decode, roles) for _ in range(DECODE_POSITIONS)]
                self._steps.append((settings, steps, Recall()))
                self.found.append(("decode", name, self._steps[-1][2]))

    def observe(self, layer: int, query: torch.Tensor, key: torch.Tensor, scale: float) -> None:
        """Measure the next layer; arguments as in `PromptInspection.observe`."""
        masses: dict[tuple[int, int], Mass] = {}
        for inspection, recall in self._prompts:
            method = inspection.method
            if layer < method.dense_layers:
                recall.add(LayerRecall.dense(query.shape[0]))
                continue
            sizes = method.query_block_tokens, method.page_tokens
            if sizes not in masses:
                masses[sizes] = prompt_mass(query, key, scale, *sizes)
            recall.add(masses[sizes].kept_by(inspection.listed(layer, query, key, scale)))
        masses.clear()
        if self._steps:
            self._observe_steps(layer, query, key, scale)

    def _observe_steps(self, layer: int, query: torch.Tensor, key: torch.Tensor, scale: float) -> None:
        tokens = key.shape[1]
        measured: list[list[LayerRecall]] = [[] for _ in self._steps]
        ends = range(tokens, 0, -DECODE_SPACING_TOKENS)[:DECODE_POSITIONS]
        for position, context in enumerate(ends):
            past = query[:, :context], key[:, :context], scale
            mass = step_mass(*past)
            for (settings, steps, _), layers in zip(self._steps, measured, strict=True):
                method, step = settings.decode, steps[position]
                assert method is not None
                if why_decode_is_dense(method, settings.min_tokens, context) is not None:
                    layers.append(LayerRecall.dense(query.shape[0]))
                    continue
                step.choose(layer, *past)
                if step.roles[layer].reads_everything:
                    layers.append(LayerRecall.dense(query.shape[0]))
                else:
                    assert step.lists is not None
                    layers.append(mass.kept_by(step.lists.unsqueeze(1)))
        for (_, _, recall), layers in zip(self._steps, measured, strict=True):
            recall.add(LayerRecall.mean(layers))
