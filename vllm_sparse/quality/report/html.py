"""The report as one HTML page that needs nothing else: style and charts are inside, and there are no scripts."""

from __future__ import annotations

from vllm_sparse.quality.gate import Decision, Gate, Outcome
from vllm_sparse.quality.report.escape import escaped
from vllm_sparse.quality.report.html_comparison import (
    density_section,
    depths_section,
    equal_density_section,
    language_section,
    speed_charts_section,
    tasks_section,
)
from vllm_sparse.quality.report.html_measures import (
    decoding_section,
    generation_section,
    recall_section,
    speed_section,
    worst_section,
)
from vllm_sparse.quality.report.markup import (
    ascending,
    density_cell,
    estimate_cell,
    html_table,
    methods_first,
    methods_of,
    note_below,
    score_cell,
    section,
    words_cell,
)
from vllm_sparse.quality.report.results import ALL_KINDS, Summary
from vllm_sparse.quality.report.style import STYLE
from vllm_sparse.quality.report.terminal import limits_in_words
from vllm_sparse.quality.report.words import DASH, TITLES, number, tokens
from vllm_sparse.quality.statistics import LEAST_DOCUMENTS
from vllm_sparse.quality.variants import Variant

# The page runs nothing, whatever a model wrote.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_TITLE = "Quality against dense"


def page(summary: Summary, gate: Gate) -> str:
    """The page of a run."""
    sections = [
        _head(summary),
        _verdict(summary, gate),
        _warnings(summary),
        _overview(summary, gate),
        tasks_section(summary),
        depths_section(summary),
        density_section(summary),
        speed_charts_section(summary),
        equal_density_section(summary),
        language_section(summary),
        decoding_section(summary),
        generation_section(summary),
        recall_section(summary),
        speed_section(summary),
        worst_section(summary),
        _not_measured(summary),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_TITLE}</title><style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(filter(None, sections))
        + "\n</body></html>\n"
    )


def _head(summary: Summary) -> str:
    facts = "".join(f"<dt>{escaped(name)}</dt><dd>{escaped(value)}</dd>" for name, value in summary.facts.items())
    return f"<h1>{_TITLE}</h1><dl>{facts}</dl>"


def _verdict(summary: Summary, gate: Gate) -> str:
    items = [f"<li>{_in_words(summary, gate, one)}</li>" for one in methods_of(summary)]
    if not items:
        return section("Verdict", "<p>No method was measured, only dense and baselines.</p>")
    note = (
        "A method passes when it meets every criterion that applies to it at every length that was measured; what was "
        "not measured, or on too few prompts, is not decided. A method that is not shown to be better than random "
        "pages of equal density is not to be offered."
    )
    return section("Verdict", f"<ul>{''.join(items)}</ul>", note_below(note), note_below(limits_in_words(gate.limits)))


def _in_words(summary: Summary, gate: Gate, variant: Variant) -> str:
    name = f"<b>{escaped(variant.name)}</b>"
    outcome = gate.outcome_of(variant.name)
    if outcome == Outcome.PASSED:
        said = f'{name} <span class="good">passes the gate</span>.'
    else:
        failed = outcome == Outcome.FAILED
        verdict = '<span class="bad">fails</span>' if failed else '<span class="open">is not decided</span>'
        why = [
            f"<li>{_why(one)}</li>"
            for one in gate.decisions
            if one.variant == variant.name and one.outcome != Outcome.PASSED
            # What is missing besides does not make it fail.
            if not failed or one.outcome == Outcome.FAILED
        ]
        said = f"{name} {verdict}:<ul>{''.join(why)}</ul>" if why else f"{name} {verdict}: nothing was measured."
    weak = [
        f"{one.phase} at {tokens(one.length_tokens)}"
        for one in summary.equal_density
        if (one.variant, one.measure, one.baseline) == (variant.name, "tasks", "random")
        if not one.missing and not one.shown
    ]
    if weak:
        said += f'<p>Its tasks are <span class="bad">not shown to be better than random</span>: {", ".join(weak)}.</p>'
    return said


def _why(one: Decision) -> str:
    at = "" if one.length_tokens is None else f" at {tokens(one.length_tokens)}"
    return f"{one.criterion}{at}: {escaped(one.found)}"


def _warnings(summary: Summary) -> str:
    if not summary.notes:
        return ""
    items = "".join(f"<li>{escaped(note)}</li>" for note in summary.notes)
    return f'<div class="warnings"><p>Read with care</p><ul>{items}</ul></div>'


def _overview(summary: Summary, gate: Gate) -> str:
    whole = {(one.variant, one.length_tokens, one.measure): one for one in summary.cells if one.kind == ALL_KINDS}
    told = {(one.variant, one.length_tokens): one for one in summary.decoding}
    timed = {(one.variant, one.length_tokens): one for one in summary.speed}
    lengths = ascending([*(length for _, length, _ in whole), *(length for _, length in (*told, *timed))])
    rows, baselines = [], []
    for length in lengths:
        for variant in methods_first(summary):
            place = variant.name, length
            tasks, language = whole.get((*place, "tasks")), whole.get((*place, "language"))
            decoding, speed = told.get(place), timed.get(place)
            if not (tasks or language or decoding or speed):
                continue
            rows.append(
                [
                    escaped(variant.name),
                    tokens(length),
                    density_cell(variant, speed),
                    score_cell(tasks),
                    estimate_cell(language.difference, "{:+.4f}") if language else DASH,
                    estimate_cell(decoding.divergence, "{:.4f}") if decoding else DASH,
                    number(decoding.same_first, "{:.1%}") if decoding else DASH,
                    number(speed.ttft_ratio if speed else None, "{:.2f}x"),
                    number(speed.tpot_ratio if speed else None, "{:.2f}x"),
                    words_cell("" if variant.baseline else _outcomes(summary, gate, *place), "text line"),
                ]
            )
            baselines.append(bool(variant.baseline))
    if not rows:
        return ""
    header = ["", "length", "density", "score", "loss, nats", "KL, nats", "same first", "TTFT", "TPOT", "verdict"]
    note = (
        "Score, loss: variant minus dense, paired, all kinds of task weighing equally. Brackets are 95 % bootstrap "
        f"intervals over documents; fewer than {LEAST_DOCUMENTS} documents have none, and one without width "
        "means that every document differs by as much. * below 5 % after Holm's adjustment over the table. TTFT, TPOT: "
        "of dense's. Density: tokens read over tokens in reach, where sparse."
    )
    return section("Methods side by side", html_table(header, rows, baselines), note_below(note))


def _outcomes(summary: Summary, gate: Gate, variant: str, length: int) -> str:
    """Of each criterion, and whether tasks beat random pages."""
    classes = {Outcome.PASSED: "good", Outcome.FAILED: "bad"}
    lines = [
        f'{one.criterion} <span class="{classes.get(one.outcome, "open")}">{one.outcome.value}</span>'
        for one in gate.decisions
        if (one.variant, one.length_tokens) == (variant, length)
    ]
    lines += [
        f'{one.phase} against random: <span class="{"good" if one.shown else "bad"}">'
        f"{'better' if one.shown else 'not shown to be better'}</span>"
        for one in summary.equal_density
        if (one.variant, one.length_tokens, one.measure, one.baseline) == (variant, length, "tasks", "random")
        if not one.missing
    ]
    return "<br>".join(lines)


def _not_measured(summary: Summary) -> str:
    if not summary.not_measured:
        return ""
    return section("Not measured", f"<p>{escaped(', '.join(TITLES[name] for name in summary.not_measured))}.</p>")
