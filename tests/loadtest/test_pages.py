"""What the pages show: methods x levels in one table, how a run went on, and runs beside one another."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from loadtest.load import command
from loadtest.load.measures import ttft_seconds
from loadtest.load.report.chart import Line, Series, chart
from loadtest.load.report.markup import table
from loadtest.load.report.over_time import in_flight, medians
from tests.loadtest.conftest import Finished, LoadTest, Simulated, scenario_of, tables_of
from tests.loadtest.test_summary import request

METHODS: dict[str, Any] = {"plain": {"ttft_seconds": 0.05}, "slow": {"ttft_seconds": 0.2}}
OPEN: dict[str, Any] = {"loop": "open", "rates": [20, 40], "requests": 24}
SLO = {"ttft_seconds": 5, "tpot_seconds": 0.5, "gap_p99_seconds": 1.5, "latency_seconds": 9}


def column(found: list[list[str]], name: str) -> list[str]:
    place = found[0].index(name)
    return [row[place] for row in found[1:]]


@pytest.fixture
def swept(load_test: LoadTest, tmp_path: Path) -> Finished:
    return load_test(scenario_of(tmp_path, METHODS, OPEN, warm_up_rounds=0, slo=SLO))


def test_methods_and_levels_are_one_table(swept: Finished) -> None:
    assert swept.code == 0, swept.output
    ratios, held, side_by_side, percentiles, throughput, *_ = tables_of(swept.page)
    assert column(ratios, "") == ["slow 20 sessions/s", "slow 40 sessions/s"]
    assert all(3 < float(cell.partition("x")[0]) < 5 for cell in column(ratios, "TTFT"))
    assert all(1 < float(cell.partition("x")[0]) < 2 for cell in column(ratios, "end to end"))
    assert column(held, "holds the SLO sessions/s") == ["40"]
    names = [f"{method} {level} sessions/s" for level in (20, 40) for method in METHODS]
    assert column(side_by_side, "") == names
    stages = swept.report["summary"]["stages"]
    expected = [one["latency_seconds"]["p50"] for stage in stages for one in stage["methods"].values()]
    assert [float(cell.split()[0]) for cell in column(side_by_side, "end to end s p50")] == pytest.approx(
        expected, abs=6e-4
    )
    assert "TTFT s p95" not in side_by_side[0], "of 12 requests there is no p95"
    assert set(column(percentiles, "measure")) == {"TTFT s", "TPOT ms", "gap ms", "end to end s"}
    assert len(percentiles) == 1 + 4 * 4
    assert column(throughput, "due a second") == ["20.00", "40.00"]
    folded = re.findall(r"<details><summary>([^<]+)", swept.page)
    assert folded == ["All percentiles and means", "Scenario"]


def test_the_page_names_every_limit(swept: Finished) -> None:
    assert (
        "Good: TTFT within 5 s, TPOT within 500 ms, 99 % of the gaps between tokens within 1500 ms, the last token "
        "within 9 s." in swept.page
    )


def test_charts_show_where_stages_begin(swept: Finished) -> None:
    page = swept.page
    over_time = page.partition("<h2>Over time</h2>")[2].partition("</section>")[0]
    assert "1: 20/s; 2: 40/s" in over_time
    for figure in over_time.split("<figure>")[1:]:
        lines = re.findall(r'<g class="stage"><title>([^<]+)</title><line x1="([\d.]+)"', figure)
        assert [name for name, _ in lines] == ["20/s", "40/s"]
        assert float(lines[0][1]) < float(lines[1][1])
        # The legend names a method once, however many stages its line is cut into.
        assert len(re.findall(r'class="key ', figure)) in (0, len(METHODS))
    assert '<g class="stage">' in page.partition("<h2>The server meanwhile</h2>")[2]
    ended = page.partition("<figcaption>Time to the first token</figcaption>")[2].partition("</figure>")[0]
    assert "stage" not in ended, "a distribution has no time"


def test_medians_of_windows() -> None:
    requests = [
        request(intended_seconds=time, first_token_seconds=time + ttft, status=status)
        for time, ttft, status in [
            (10.0, 1.0, "ok"),
            (11.0, 3.0, "ok"),
            (12.0, 9.0, "ok"),
            (13.0, 99.0, "truncated"),
            (25.0, 4.0, "ok"),
        ]
    ]
    assert medians(requests, ttft_seconds, 0.5, 10.0, 5.0) == [(11.0, 6.0), (25.0, 8.0)]
    assert medians([], ttft_seconds, 1, 0.0, 1.0) == []


def test_requests_in_flight_are_steps() -> None:
    requests = [request(sent_seconds=sent, end_seconds=end) for sent, end in [(1.0, 4.0), (2.0, 3.0)]]
    assert in_flight(requests) == [(1, 0), (1, 1), (2, 1), (2, 2), (3, 2), (3, 1), (4, 1), (4, 0)]


def test_lines_close_to_one_another_have_one_label() -> None:
    drawn = chart(
        "t", [Series("a", [(0, 1), (100, 2)], 0)], "x", "y", lines=[Line(x, f"L{x}", "m") for x in (50, 51, 90)]
    )
    assert re.findall(r">(L\d+)<", drawn) == ["L50", "L90"]
    assert drawn.count('<g class="stage">') == 3


def test_where_colours_come_again_the_shapes_differ() -> None:
    drawn = chart("t", [Series(f"s{number}", [(0, number), (1, number)], number) for number in range(16)], "x", "y")
    groups = re.findall(r'<g class="(s\d)">(.*?)</g>', drawn)
    shapes = [
        (
            colour,
            re.search(r'dasharray="([^"]+)"', drawing),
            re.findall(r"<(circle|rect|path) ?(?:d=.M[\d. ]+(.))?", drawing),
        )
        for colour, drawing in groups
    ]
    assert len({(colour, dash.group(1) if dash else "", str(marks)) for colour, dash, marks in shapes}) == 16


def test_a_column_without_values_is_left_out() -> None:
    assert tables_of(table(["", "a", "b"], [["x", "-", "0"], ["y", "-", "-"]])) == [[["", "b"], ["x", "0"], ["y", "-"]]]


def test_a_page_compares_runs(simulated: Simulated, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = []
    for name, ttft in (("a", 0.4), ("b & co", 0.2), ("c", 0.1)):
        scenario = scenario_of(tmp_path, {"one": {"ttft_seconds": ttft}}, OPEN, warm_up_rounds=0)
        mine = tmp_path / "mine.yaml"
        mine.write_text(yaml.safe_dump(scenario))
        folders.append(str(tmp_path / name))
        command.main([str(mine), "--url", simulated.url, "--out", folders[-1]])
    capsys.readouterr()
    written = tmp_path / "page.html"
    command.main(["compare", *folders, "--page", str(written)])
    page = written.read_text()
    runs, ratios, held, side_by_side, *_ = tables_of(page)
    assert column(runs, "run") == folders
    assert column(runs, "verdict") == ["passed"] * 3
    levels = ("20 sessions/s", "40 sessions/s")
    assert column(ratios, "") == [f"{run} : A, one {level}" for level in levels for run in "BC"]
    expected = [0.5, 0.25, 0.5, 0.25]
    assert [float(cell.partition("x")[0]) for cell in column(ratios, "TTFT")] == pytest.approx(expected, rel=0.15)
    assert column(held, "holds the SLO sessions/s") == ["40"] * 3
    assert column(side_by_side, "") == [f"{run}, one {level}" for level in levels for run in "ABC"]
    (over_load,) = re.findall(r"<figcaption>TTFT at the median</figcaption>.*?</figure>", page)
    assert over_load.count("<polyline") == 3
    assert re.findall(r"</svg>([ABC], one)</span>", over_load) == ["A, one", "B, one", "C, one"]
    assert "The scenarios of A and B differ in: methods." in page
    assert re.findall(r"<summary>(Scenario of \w)", page) == [f"Scenario of {run}" for run in "ABC"]
    assert "<script" not in page
    assert "B: " in capsys.readouterr().out, "the table is printed too"


def test_a_page_that_cannot_be_written_is_said(
    swept: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        command.main(["compare", str(swept.folder), str(swept.folder), "--page", str(tmp_path / "no" / "page.html")])
    assert "page.html cannot be written: No such file or directory" in capsys.readouterr().err
