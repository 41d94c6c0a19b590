"""The page: one HTML file with all that it needs, to be read on a screen, a phone and on paper."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

import torch

from vllm_sparse.inspect.kept import KeptLayer, KeptMap
from vllm_sparse.inspect.picture import (
    FUTURE,
    KEPT_SHADES,
    KEPT_WITHOUT_MASS,
    LEAST_SHARE,
    MISSED_SHADES,
    WHITE,
    Colour,
    data_url,
    kept_picture,
)
from vllm_sparse.step.roles import Role

# Of an overview's cell, in the units of its drawing.
CELL_WIDTH, CELL_HEIGHT, LABEL_WIDTH = 40, 22, 34
# Of keys that a pointer tells apart, and the text that it shows of each.
HOVER_PARTS, HOVER_CHARACTERS = 64, 160
# Share of the attention lost that has the lightest colour in an overview, on a logarithmic scale to all of it.
LEAST_LOSS = 1e-3
# How much of a cell's colour shows where a single one of its tokens was read.
LEAST_SHOWN = 0.25
# An overview with more heads has no numbers in its cells.
MOST_NUMBERED_HEADS = 16

STYLE = """
:root { color-scheme: light dark; --ink: #1c2733; --page: #fff; --soft: #5a6875; --line: #d5dde5; --mark: #b3160e }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8ebee; --page: #161b20; --soft: #a3afba; --line: #3a444d; --mark: #ff8a80 } }
body { font: 16px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--page);
  max-width: 70rem; margin: 0 auto; padding: 1rem; overflow-wrap: anywhere }
h1 { font-size: 1.5rem; line-height: 1.2 }
h2 { margin-top: 2.5rem; border-top: 2px solid var(--line); padding-top: 1rem }
h3 { margin: 1.6rem 0 .2rem; font-size: 1.05rem } p { margin: .3rem 0 .8rem; max-width: 46rem }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; margin: 1rem 0 }
dt { color: var(--soft) } dd { margin: 0; font-variant-numeric: tabular-nums }
.overviews { display: flex; flex-wrap: wrap; gap: 1.5rem } .overviews figure { flex: 1 1 20rem; max-width: 34rem }
figure { margin: 0; break-inside: avoid } figcaption { font-size: .8rem; font-variant-numeric: tabular-nums }
figure img, figure svg { display: block; width: 100%; image-rendering: pixelated }
svg text { font: 11px system-ui; fill: var(--ink) }
.maps { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .8rem }
.maps figure { max-width: 22rem }
.maps img { aspect-ratio: 1; border: 1px solid #9aa7b3; box-sizing: border-box }
.strips { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(22rem, 100%), 1fr)); gap: .5rem 1rem }
.strips img { height: 1.6rem; border: 1px solid #9aa7b3; box-sizing: border-box }
.legend span { display: inline-block; width: 2.6em; height: .9em; border: 1px solid #9aa7b3; vertical-align: -.1em }
.muted { color: var(--soft); font-weight: normal } .axis { font-size: .8rem; color: var(--soft) }
.verdict { border-left: 4px solid var(--mark); padding-left: .8rem } a { color: inherit }
.over { position: relative } .over svg { position: absolute; inset: 0; height: 100% }
#keys rect { fill: transparent } #keys rect:hover { fill: rgb(120 120 120 / .25) }
#keys .mark { fill: rgb(210 0 200 / .3); stroke: #d200c8; stroke-width: 1; vector-effect: non-scaling-stroke }
.ticks { display: flex; justify-content: space-between; font-size: .7rem; color: var(--soft) }
@media print { :root { --ink: #000; --page: #fff; --soft: #444; --line: #bbb; --mark: #b3160e }
  body { max-width: none; padding: 0; font-size: 11px; print-color-adjust: exact;
  -webkit-print-color-adjust: exact } #decode { break-before: page } h3 { break-after: avoid } }
"""


@dataclass(frozen=True)
class Inspected:
    """What a page shows.

    Attributes:
        title: the page's heading.
        facts: what was run, by name.
        prefill: the layers in a prompt; None where it is dense.
        decode: the layers in the decode step after it; None where it is dense.
        notes: of each phase, a sentence on what is shown or why nothing is.
        compared: the true attention of the prompt was computed.
        words: the text of each token of the prompt.
        marks: first token and the one after the last of what is to be marked.
    """

    title: str
    facts: dict[str, str]
    prefill: list[KeptLayer] | None
    decode: list[KeptLayer] | None
    notes: dict[str, str]
    compared: bool
    words: Sequence[str]
    marks: Sequence[tuple[int, int]] = ()


def render(inspected: Inspected) -> str:
    """The page as text."""
    facts = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in inspected.facts.items())
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(inspected.title)}</title><style>{STYLE}</style></head><body>",
            f"<h1>{escape(inspected.title)}</h1>",
            _verdict("Prompt", "prefill", inspected.prefill),
            _verdict("Decode step", "decode", inspected.decode),
            f"<dl>{facts}</dl>",
            _hover(inspected.words, inspected.marks),
            _legend(inspected.compared or inspected.decode is not None),
            "<p><b>Density</b> is the share of the tokens in reach that a head read. <b>Recall</b> is the share of its "
            "true attention that fell on them; the true attention is that of a dense run of the model, so it does not "
            "show what a layer makes of the error of the layers before it.</p>",
            *_prompt_section(inspected),
            *_decode_section(inspected),
            "</body></html>",
        ]
    )


def _verdict(title: str, phase: str, layers: list[KeptLayer] | None) -> str:
    """How much was kept, and where the least."""
    heads = [(head, number, layer.index) for layer in layers or () for number, head in enumerate(layer.heads)]
    known = [(head.recall, head.density, number, index) for head, number, index in heads if head.recall is not None]
    if not known:
        return ""
    recall, density, number, index = min(known)
    return (
        f'<p class="verdict"><b>{title}</b>: {_mean([one for one, *_ in known]):.1%} of the attention was kept with '
        f"{_mean([head.density for head, *_ in heads]):.1%} of the tokens. The worst is "
        f'<a href="#{phase}{index}">layer {index}, head {number}</a>: it kept {recall:.1%} with {density:.1%}.</p>'
    )


def _hover(words: Sequence[str], marks: Sequence[tuple[int, int]]) -> str:
    """What lies over every picture, once: keys from left to right, whose tokens a pointer shows, and what is marked."""
    tokens = len(words)
    if not tokens:
        return ""
    parts = []
    for number in range(min(HOVER_PARTS, tokens)):
        first, stop = (place * tokens // min(HOVER_PARTS, tokens) for place in (number, number + 1))
        parts.append(_part(first, stop, words))
    parts += [_part(first, stop, words, ' class="mark"') for first, stop in marks]
    return (
        f'<svg width="0" height="0" style="position: absolute"><symbol id="keys" viewBox="0 0 {tokens} 1" '
        f'preserveAspectRatio="none">{"".join(parts)}</symbol></svg>'
    )


def _part(first: int, stop: int, words: Sequence[str], named: str = "") -> str:
    said = " ".join("".join(words[first:stop]).split())
    if len(said) > HOVER_CHARACTERS:
        said = f"{said[: HOVER_CHARACTERS // 2]} … {said[-HOVER_CHARACTERS // 2 :]}"
    title = escape(f"keys {first} to {stop - 1}: {said}")
    return f'<rect{named} x="{first}" y="0" width="{stop - first}" height="1"><title>{title}</title></rect>'


def _legend(compared: bool) -> str:
    """What the colours mean."""
    reach = _swatch(FUTURE, FUTURE) + " after the query, out of reach"
    if not compared:
        read, missed = _swatch(KEPT_WITHOUT_MASS, KEPT_WITHOUT_MASS), _swatch(WHITE, WHITE)
        return f'<p class="legend">{read} read · {missed} not read · {reach}.</p>'
    return (
        f'<p class="legend">{_swatch(*KEPT_SHADES)} read · {_swatch(*MISSED_SHADES)} not read · {reach}. The darker, '
        f"the more of the true attention, from a share of {LEAST_SHARE:g} to all of it on a logarithmic scale: dark "
        "orange is what the method missed.</p>"
    )


def _swatch(light: Colour, dark: Colour) -> str:
    colours = ", ".join(f"rgb({red} {green} {blue})" for red, green, blue in (light, dark))
    return f'<span style="background: linear-gradient(90deg, {colours})"></span>'


def _prompt_section(inspected: Inspected) -> list[str]:
    """The prompt's layers."""
    lines = ['<h2 id="prefill">Prompt</h2>', f"<p>{escape(inspected.notes['prefill'])}</p>"]
    if inspected.prefill is None:
        return lines
    lines += [
        _overviews("prefill", inspected.prefill),
        '<p class="axis">Each map: queries from the first at the top to the last at the bottom, keys from the first at '
        "the left to the last at the right.</p>",
    ]
    for layer in inspected.prefill:
        lines.append(f'<h3 id="prefill{layer.index}">Layer {layer.index}{_summary(layer)}</h3>')
        lines.append(f'<div class="maps">{_figures("prefill", layer, kept_picture, len(inspected.words))}</div>')
    return lines


def _decode_section(inspected: Inspected) -> list[str]:
    """The decode step's layers."""
    lines = ['<h2 id="decode">Decode step</h2>', f"<p>{escape(inspected.notes['decode'])}</p>"]
    if inspected.decode is None:
        return lines
    lines += [
        _overviews("decode", inspected.decode),
        '<p class="axis">Each strip: keys from the first at the left to the newest at the right; above what was read, '
        "below what was not.</p>",
    ]
    for layer in inspected.decode:
        lines.append(f'<h3 id="decode{layer.index}">Layer {layer.index}{_summary(layer)}</h3>')
        lines.append(f'<div class="strips">{_figures("decode", layer, strip_picture, len(inspected.words))}</div>')
    return lines


def strip_picture(kept: KeptMap) -> torch.Tensor:
    """One query's map in two rows, of what was read and of what was not: uint8 ``[2, columns, 3]``."""
    assert kept.kept_mass is not None
    assert kept.missed_mass is not None
    ones, zeros = torch.ones_like(kept.share), torch.zeros_like(kept.share)
    # Of a long context a cell holds many tokens: one of which few were read is pale.
    share = torch.where(kept.share > 0, kept.share.clamp(min=LEAST_SHOWN), kept.share)
    read = KeptMap(share, kept.kept_mass, zeros, kept.density, kept.recall)
    missed = KeptMap(zeros, ones, kept.missed_mass, kept.density, kept.recall)
    return torch.cat([kept_picture(read), kept_picture(missed)])


def _meaning(layer: KeptLayer) -> str | None:
    """What a layer's role means; None where only the numbers say what it reads."""
    return layer.role.meaning if isinstance(layer.role, Role) else None


def _summary(layer: KeptLayer) -> str:
    """What a layer's heading says beside its number."""
    words = _meaning(layer)
    if not layer.heads:
        return f' <span class="muted">· {words}</span>'
    density = [head.density for head in layer.heads]
    parts = [] if words is None else [words]
    parts.append(f"density {_mean(density):.3f} ({min(density):.3f} to {max(density):.3f})")
    recall = [head.recall for head in layer.heads if head.recall is not None]
    if recall:
        parts.append(f"recall {_mean(recall):.3f}, worst {min(recall):.3f} in head {recall.index(min(recall))}")
    return f' <span class="muted">· {escape(" · ".join(parts))}</span>'


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _figures(phase: str, layer: KeptLayer, picture: Callable[[KeptMap], torch.Tensor], tokens: int) -> str:
    """A picture and its caption for each head; `tokens` of the prompt lie along it."""
    ticks = "".join(f"<span>{place * tokens // 4}</span>" for place in range(5))
    figures = []
    for number, head in enumerate(layer.heads):
        recall = "" if head.recall is None else f" · recall {head.recall:.3f}"
        # The last cell may hold fewer tokens than it has room for.
        width = f"{tokens / (head.share.shape[1] * layer.cell_tokens):.2%}"
        data = f'data-phase="{phase}" data-layer="{layer.index}" data-head="{number}" data-density="{head.density:.6f}"'
        data += "" if head.recall is None else f' data-recall="{head.recall:.6f}"'
        caption = f"head {number} · density {head.density:.3f}{recall}"
        figures.append(
            f'<figure {data}><figcaption>{caption}</figcaption><div class="over"><img alt="layer {layer.index}, '
            f'{caption}" src="{data_url(picture(head))}"><svg preserveAspectRatio="none" style="width: {width}"><use '
            f'href="#keys" width="100%" height="100%"/></svg></div><div class="ticks" style="width: {width}">{ticks}'
            "</div></figure>"
        )
    return "".join(figures)


def _overviews(phase: str, layers: list[KeptLayer]) -> str:
    """Density and recall of all layers and heads, as tables of colours that lead to the layers."""
    figures = [_overview(phase, layers, "Density", lambda head: head.density, KEPT_SHADES, False)]
    if any(head.recall is not None for layer in layers for head in layer.heads):
        figures.append(_overview(phase, layers, "Recall", lambda head: head.recall or 0.0, MISSED_SHADES, True))
    return f'<div class="overviews">{"".join(figures)}</div>'


def _overview(
    phase: str,
    layers: list[KeptLayer],
    name: str,
    value: Callable[[KeptMap], float],
    shades: tuple[Colour, Colour],
    low_is_dark: bool,
) -> str:
    """A drawing of one number for each layer (down) and head (across)."""
    heads = max(len(layer.heads) for layer in layers)
    numbered = heads <= MOST_NUMBERED_HEADS
    width = CELL_WIDTH if numbered else CELL_HEIGHT
    cells = []
    for row, layer in enumerate(layers):
        top = row * CELL_HEIGHT
        cells.append(f'<text x="{LABEL_WIDTH - 6}" y="{top + 15}" text-anchor="end">{layer.index}</text>')
        if not layer.heads:
            cells.append(
                f'<text x="{LABEL_WIDTH + 4}" y="{top + 15}" style="fill: var(--soft)">{_meaning(layer)}</text>'
            )
        for column, head in enumerate(layer.heads):
            found = value(head)
            depth = 1 - math.log(max(1 - found, LEAST_LOSS), LEAST_LOSS) if low_is_dark else found
            red, green, blue = (round(light + depth * (dark - light)) for light, dark in zip(*shades, strict=True))
            left = LABEL_WIDTH + column * width
            cells.append(
                f'<a href="#{phase}{layer.index}"><title>layer {layer.index}, head {column}: {found:.3f}</title>'
                f'<rect x="{left}" y="{top}" width="{width - 1}" height="{CELL_HEIGHT - 1}" '
                f'fill="rgb({red} {green} {blue})"/>'
            )
            if numbered:
                place = f'x="{left + width / 2:g}" y="{top + 15}" text-anchor="middle"'
                cells.append(f'<text {place} style="fill: {"#fff" if depth > 0.5 else "#1c2733"}">{found:.2f}</text>')
            cells.append("</a>")
    said = f"; the darker, the more is lost, from {LEAST_LOSS:.1%} on a logarithmic scale" if low_is_dark else ""
    size = LABEL_WIDTH + heads * width, len(layers) * CELL_HEIGHT
    return (
        f"<figure><figcaption><b>{name}</b> by layer (down) and head (across){said}</figcaption>"
        f'<svg viewBox="0 0 {size[0]} {size[1]}" style="max-width: {size[0] * 1.4:g}px">{"".join(cells)}</svg></figure>'
    )
