"""Sections of the page of one measure each, and the worst prompts."""

from __future__ import annotations

from collections.abc import Sequence

from vllm_sparse.quality.records import DENSE
from vllm_sparse.quality.report.charts import Series, chart, recall_key, recall_map
from vllm_sparse.quality.report.escape import escaped
from vllm_sparse.quality.report.markup import (
    along_the_text,
    ascending,
    density_cell,
    estimate_cell,
    figures,
    html_table,
    is_method,
    methods_first,
    methods_of,
    note_below,
    section,
    words_cell,
)
from vllm_sparse.quality.report.results import Head, Summary, WorstPrompt
from vllm_sparse.quality.report.words import number, parts, tokens, variant_of

# Of what models said; more does not help to see what went wrong.
MOST_CHARACTERS = 600


def decoding_section(summary: Summary) -> str:
    """KL to dense and same first tokens."""
    if not summary.decoding:
        return ""
    numbers = {one.name: index for index, one in enumerate(methods_first(summary))}
    found = summary.decoding
    rows = [
        [
            escaped(one.variant),
            tokens(one.length_tokens),
            str(one.texts),
            str(one.least_tokens),
            estimate_cell(one.divergence, "{:.4f}"),
            f"{one.same_first:.2%}",
        ]
        for one in found
    ]
    table = html_table(
        ["", "length", "texts", "tokens, at least", "mean KL, nats", "same first token"],
        rows,
        [not is_method(summary, one.variant) for one in found],
    )
    methods = [one for one in found if is_method(summary, one.variant) and one.divergence_by_position]
    charts = [
        chart(
            f"KL by position, {tokens(length)}",
            [
                Series(one.variant, along_the_text(one.divergence_by_position), numbers[one.variant], marked=False)
                for one in methods
                if one.length_tokens == length
            ],
            "generated tokens, share",
            "KL to dense, nats",
        )
        for length in ascending(one.length_tokens for one in methods)
    ]
    note = "Every step is told what dense said before, so that each position is compared on equal terms."
    return section("Decoding", table, figures(charts), note_below(note))


def generation_section(summary: Summary) -> str:
    """Free generations."""
    rows = [
        [
            escaped(one.variant),
            tokens(one.length_tokens),
            words_cell(escaped(one.kind)),
            str(one.difference.pairs),
            f"{one.median_tokens:.0f}",
            f"{one.median_prefix_tokens:.0f}",
            f"{one.dense_score:.3f}",
            estimate_cell(one.difference),
            parts(one.difference_by_part),
            estimate_cell(one.agreement),
            parts(one.agreement_by_part),
            estimate_cell(one.loss),
            f"{number(one.dense_repeated, '{:.2f}')}, {number(one.repeated, '{:.2f}')}",
        ]
        for one in summary.generations
    ]
    header = ["", "length", "asked for", "pairs", "tokens", "same until", "dense score", "score", "by quarter"]
    header += ["agreement", "by quarter", "-log p", "repeated"]
    note = (
        "Tokens generated, and tokens before the first that differs from dense: medians. Score, agreement and -log p: "
        "minus dense. Agreement is the share of tokens that dense would have said, and -log p (nats) is under dense, "
        "both given what the variant had said before. Repeated: share of runs of 16 tokens that were said before, of "
        "dense and of the variant."
    )
    baselines = [not is_method(summary, one.variant) for one in summary.generations]
    return section("Free generation", html_table(header, rows, baselines), note_below(note)) if rows else ""


def recall_section(summary: Summary) -> str:
    """Attention mass kept, by layer and head."""
    if not summary.recall:
        return ""
    rows = [
        [
            escaped(one.variant),
            tokens(one.length_tokens),
            one.phase,
            str(one.texts),
            number(sum(one.density) / len(one.density) if one.density else None, "{:.2f}"),
            number(one.mean),
            number(one.best_mean),
            words_cell(_heads(one.worst if is_method(summary, one.variant) else one.worst[:3]), "text wide"),
        ]
        for one in summary.recall
    ]
    header = ["", "length", "phase", "texts", "density", "mass kept", "best list", "worst heads: layer.head"]
    baselines = [not is_method(summary, one.variant) for one in summary.recall]
    maps = [
        recall_map(f"{one.variant}, {one.phase}, {tokens(one.length_tokens)}", one.recall)
        for one in summary.recall
        if is_method(summary, one.variant)
    ]
    note = (
        "Attention mass kept of real texts, beside that of the best list of equal length, by layer and query head. Of "
        "baselines only the three worst heads are named."
    )
    key = recall_key() if maps else ""
    return section("Recall", html_table(header, rows, baselines), note_below(note), key, figures(maps))


def _heads(heads: Sequence[Head]) -> str:
    return ", ".join(f"{one.layer}.{one.head} {one.recall:.2f} of {one.best:.2f}" for one in heads)


def speed_section(summary: Summary) -> str:
    """Times and densities."""
    rows = [
        [
            escaped(one.variant),
            tokens(one.length_tokens),
            str(one.repeats),
            number(one.ttft_s),
            number(one.ttft_ratio, "{:.2f}x"),
            number(one.tpot_s * 1e3, "{:.2f}"),
            number(one.tpot_ratio, "{:.2f}x"),
            "1" if one.variant == DENSE else density_cell(variant_of(summary, one.variant), one),
        ]
        for one in summary.speed
    ]
    header = ["", "length", "repeats", "TTFT s", "of dense", "TPOT ms", "of dense", "density"]
    baselines = [one.variant != DENSE and not is_method(summary, one.variant) for one in summary.speed]
    note = "Medians of a request alone on the server; ratios are medians over pairs of equal prompts."
    return section("Speed", html_table(header, rows, baselines), note_below(note)) if rows else ""


def worst_section(summary: Summary) -> str:
    """What dense said and what each method said, side by side."""
    parts = []
    for variant in methods_of(summary):
        own = [one for one in summary.worst if one.variant == variant.name]
        if own:
            parts.append(f"<h3>{escaped(variant.name)}</h3>{''.join(map(_prompt, own))}")
    note = (
        "The answers that lost most against dense, of each kind and length in turn. Texts of more than "
        f"{MOST_CHARACTERS} characters are cut."
    )
    return section("Worst prompts", *parts, note_below(note)) if parts else ""


def _prompt(one: WorstPrompt) -> str:
    place = [one.kind.replace("_", " "), tokens(one.length_tokens), f"document {one.document}", f"prompt {one.prompt}"]
    if one.depth is not None:
        place.append(f"depth {one.depth:.0%}")
    # Of a question the end counts, of an answer the beginning.
    asked = one.question if len(one.question) <= MOST_CHARACTERS else "… " + one.question[-MOST_CHARACTERS:]
    sides = [
        ("Question", asked),
        ("Expected", "\n".join(one.answers)),
        (f"Dense said, score {one.dense_score:.2f}", _cut(one.dense_text)),
        (f"{one.variant} said, score {one.score:.2f}", _cut(one.text)),
    ]
    boxes = "".join(f"<div><small>{escaped(name)}</small><pre>{escaped(text)}</pre></div>" for name, text in sides)
    return f'<div class="prompt"><p class="soft">{escaped(", ".join(place))}</p><div class="sides">{boxes}</div></div>'


def _cut(text: str) -> str:
    if not text:
        return "(nothing)"
    return text if len(text) <= MOST_CHARACTERS else text[:MOST_CHARACTERS] + " …"
