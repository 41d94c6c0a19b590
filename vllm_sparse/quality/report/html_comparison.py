"""Sections of the page that compare variants with dense and with baselines, by task and by text."""

from __future__ import annotations

from collections.abc import Callable

from vllm_sparse.quality.records import DENSE
from vllm_sparse.quality.report.charts import Series, chart, difference_map
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
    score_cell,
    section,
    words_cell,
)
from vllm_sparse.quality.report.results import (
    ALL_KINDS,
    BASELINES,
    DEPTHS,
    PHASES,
    Cell,
    EqualDensity,
    Measure,
    Phase,
    Summary,
    is_sparse,
)
from vllm_sparse.quality.report.words import DASH, density_at, number, tokens
from vllm_sparse.quality.variants import Variant


def tasks_section(summary: Summary) -> str:
    """Score minus dense by kind."""
    return _by_kind(
        summary,
        "tasks",
        "Tasks",
        "Score minus dense. * below 5 % after Holm's adjustment over all cells of methods (or of baselines) in these "
        "tables. † dense scores too low for a loss to show.",
        "{:+.3f}",
    )


def _by_kind(summary: Summary, measure: Measure, title: str, note: str, form: str) -> str:
    """A table for each length: variants over kinds, with dense's own mean on top."""
    cells = [one for one in summary.cells if one.measure == measure]
    parts = []
    for length in ascending(one.length_tokens for one in cells):
        here = {(one.variant, one.kind): one for one in cells if one.length_tokens == length}
        kinds = [ALL_KINDS, *sorted({kind for _, kind in here if kind != ALL_KINDS})]
        shown = [one for one in methods_first(summary) if (one.name, ALL_KINDS) in here]
        dense = {kind: next(one for (_, name), one in here.items() if name == kind) for kind in kinds}
        rows = [["dense", "1", *(_dense_mean(dense[kind]) for kind in kinds)]]
        for variant in shown:
            speed = next((s for s in summary.speed if (s.variant, s.length_tokens) == (variant.name, length)), None)
            own = (here.get((variant.name, kind)) for kind in kinds)
            rows.append([escaped(variant.name), density_cell(variant, speed), *(score_cell(one, form) for one in own)])
        names = [escaped(kind.replace("_", " ")) if kind else "all" for kind in kinds]
        table = html_table(["", "density", *names], rows, [False, *(bool(one.baseline) for one in shown)])
        parts.append(f"<h3>{tokens(length)}</h3>{table}")
    return section(title, *parts, note_below(note)) if parts else ""


def _dense_mean(cell: Cell) -> str:
    mark = " †" if cell.dense_too_low else ""
    return f"{number(cell.dense_mean)}{mark}<small>{cell.difference.pairs} pairs</small>"


def depths_section(summary: Summary) -> str:
    """Score minus dense by length and depth."""
    most = max((abs(one.difference) for one in summary.depths if one.difference is not None), default=0.0)
    columns = [f"{100 * part // DEPTHS}-{100 * (part + 1) // DEPTHS} %" for part in range(DEPTHS)]
    maps = []
    for variant in methods_of(summary):
        own = [one for one in summary.depths if one.variant == variant.name]
        rows = [
            (tokens(length), [one.difference for one in own if one.length_tokens == length])
            for length in ascending(one.length_tokens for one in own)
        ]
        if rows:
            maps.append(
                difference_map(variant.name, rows, columns, "where the answer stands in the text", max(most, 0.1))
            )
    note = "Score minus dense, of the questions whose answer stands in one place, by where it stands."
    return section("By length and depth", figures(maps), note_below(note)) if maps else ""


def density_section(summary: Summary) -> str:
    """Score minus dense over density, beside the baselines."""

    def density(variant: Variant, length: int, phase: Phase) -> float | None:
        return density_at(summary, variant.name, length, phase)

    charts = _quality_charts(summary, "density", density, "{phase} density")
    note = (
        "Score minus dense, all kinds together, with its 95 % interval. Up and to the left is better. Dashed: "
        "baselines at their densities, up to dense. A method that is sparse in both phases stands in both charts."
    )
    return section("Quality against density", figures(charts), note_below(note)) if charts else ""


def speed_charts_section(summary: Summary) -> str:
    """Score minus dense over times."""
    timed = {(one.variant, one.length_tokens): one for one in summary.speed}

    def ratio(variant: Variant, length: int, phase: Phase) -> float | None:
        found = None if variant.baseline else timed.get((variant.name, length))
        return None if found is None else found.ttft_ratio if phase == "prefill" else found.tpot_ratio

    charts = _quality_charts(summary, "speed", ratio, "{time}, of dense")
    note = (
        "Score minus dense over the time to the first token (prefill) and per token that follows (decode), of a "
        "request alone. Up and to the left is better; right of 1 is slower. Baselines are not built for speed."
    )
    return section("Quality against speed", figures(charts), note_below(note)) if charts else ""


def _quality_charts(
    summary: Summary, what: str, x_of: Callable[[Variant, int, Phase], float | None], label: str
) -> list[str]:
    """For each phase and length: score minus dense over what `x_of` says; without methods there is no chart."""
    whole = {
        (one.variant, one.length_tokens): one
        for one in summary.cells
        if one.measure == "tasks" and one.kind == ALL_KINDS and one.difference.mean is not None
    }
    charts = []
    for phase in PHASES:
        for length in ascending(length for _, length in whole):
            series = []
            curves: dict[str, list[tuple[float, float]]] = {baseline: [] for baseline in BASELINES}
            for index, variant in enumerate(methods_first(summary)):
                cell, x = whole.get((variant.name, length)), x_of(variant, length, phase)
                if not is_sparse(variant, phase) or cell is None or cell.difference.mean is None or x is None:
                    continue
                if variant.baseline:
                    curves[variant.baseline].append((x, cell.difference.mean))
                else:
                    point, bar = (x, cell.difference.mean), cell.difference.interval
                    series.append(Series(variant.name, [point], index, [bar]))
            if not series:
                continue
            for index, (baseline, points) in enumerate(curves.items()):
                if points:
                    curve = [*sorted(points), (1.0, 0.0)]
                    series.append(Series(baseline, curve, index, marked=False, baseline=True))
            series.append(Series(DENSE, [(1.0, 0.0)], len(BASELINES), baseline=True))
            time = "TTFT" if phase == "prefill" else "TPOT"
            x_label = label.format(phase=phase, time=time)
            title = f"{phase.capitalize()} {what}, {tokens(length)}"
            charts.append(chart(title, series, x_label, "score minus dense"))
    return charts


def equal_density_section(summary: Summary) -> str:
    """A row for each variant, length, measure and phase; a column for each baseline."""
    rows: dict[tuple[str, int, str, Phase], dict[str, EqualDensity]] = {}
    for one in summary.equal_density:
        rows.setdefault((one.variant, one.length_tokens, one.measure, one.phase), {})[one.baseline] = one
    if not rows:
        return ""
    cells = [
        [
            escaped(variant),
            tokens(length),
            measure,
            f"{phase} {number(found['random'].density, '{:.2f}')}",
            *(_better_by(found[baseline]) for baseline in BASELINES),
            words_cell(_against_random(found["random"])),
        ]
        for (variant, length, measure, phase), found in rows.items()
        if any(not one.missing for one in found.values())
    ]
    missing = dict.fromkeys(one.missing for one in summary.equal_density if one.missing)
    absent = note_below(f"Not compared: {'; '.join(missing)}.") if missing else ""
    note = (
        "How much better than a baseline that reads as much in that phase: score, or nats of loss or of KL saved. The "
        "baseline is interpolated prompt by prompt between its two nearest settings, of which dense is the highest. "
        "The oracle knows the true attention: what is missing to it is what choosing better can bring."
    )
    header = ["", "length", "measure", "density", *(f"than {baseline}" for baseline in BASELINES), "verdict"]
    return section(
        "Against baselines of equal density", html_table(header, cells) if cells else "", note_below(note), absent
    )


def _better_by(one: EqualDensity) -> str:
    if one.missing:
        return DASH
    lowest = "<small>which reads more</small>" if one.below_lowest else ""
    return estimate_cell(one.advantage, "{:+.3f}" if one.measure == "tasks" else "{:+.4f}") + lowest


def _against_random(one: EqualDensity) -> str:
    kind = "open" if one.missing else "good" if one.shown else "bad"
    return f'<span class="{kind}">{escaped(one.verdict)}</span>'


def language_section(summary: Summary) -> str:
    """Loss minus dense by kind and along the text."""
    table = _by_kind(
        summary,
        "language",
        "Language",
        "Mean -log p of the last half of real texts minus dense, nats a token; every text weighs equally.",
        "{:+.4f}",
    )
    numbers = {one.name: index for index, one in enumerate(methods_first(summary))}
    charts = [
        chart(
            f"Loss by position, {tokens(length)}",
            [
                Series(variant.name, along_the_text(one.difference), numbers[variant.name], marked=False)
                for variant in methods_of(summary)
                for one in summary.positions
                if (one.variant, one.length_tokens) == (variant.name, length)
            ],
            "position in the text, share",
            "nats minus dense",
        )
        for length in ascending(one.length_tokens for one in summary.positions if is_method(summary, one.variant))
    ]
    return table.removesuffix("</section>") + figures(charts) + "</section>" if table else ""
