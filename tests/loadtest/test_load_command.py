"""The command: what it refuses, the server that it starts, reports made again, and two runs compared."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from loadtest.load import command
from tests.loadtest.conftest import ROOT, LoadTest, Simulated, prompts_file, scenario_of
from tests.serving.server import free_port

OPEN: dict[str, Any] = {"loop": "open", "rates": [20], "requests": 40}


def refusal(arguments: list[str]) -> str:
    """What the command says when it refuses."""
    with pytest.raises(SystemExit) as caught:
        command.main(arguments)
    assert isinstance(caught.value.code, str), caught.value
    return caught.value.code


def written(tmp_path: Path, scenario: dict[str, Any], name: str = "mine") -> str:
    path = tmp_path / f"{name}.yaml"
    path.write_text(yaml.safe_dump(scenario))
    return str(path)


def test_what_is_wrong_is_said(simulated: Simulated, tmp_path: Path) -> None:
    mine = written(tmp_path, scenario_of(tmp_path, {"plain": {}}, OPEN))
    out = ["--out", str(tmp_path / "run")]
    nobody = f"http://127.0.0.1:{free_port()}"
    assert "no scenario 'smokey'" in refusal(["smokey"])
    assert f"no OpenAI-compatible server answers at {nobody}" in refusal([mine, "--url", nobody, *out])
    assert "--model other: the server has simulated" in refusal(
        [mine, "--url", simulated.url, "--model", "other", *out]
    )
    assert "no tokenizer.json in" in refusal([mine, "--url", simulated.url, "--tokenizer", str(tmp_path), *out])
    assert not (tmp_path / "run").exists(), "of a run that never began nothing is left"
    gone = ["--set", f"workloads.0.file={tmp_path / 'gone.jsonl'}"]
    assert "gone.jsonl cannot be read" in refusal([mine, "--url", simulated.url, *gone, *out])
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"prompt": }\n')
    bad = ["--set", f"workloads.0.file={tmp_path / 'bad.jsonl'}"]
    assert "bad.jsonl, line 2, is no JSON" in refusal([mine, "--url", simulated.url, *bad, *out])
    (tmp_path / "bad.jsonl").write_text('{"question": "a"}\n')
    assert "a line needs either prompt or messages" in refusal([mine, "--url", simulated.url, *bad, *out])
    assert "journal.jsonl cannot be read" in refusal(["report", str(tmp_path)])


def test_a_run_is_not_written_over(load_test: LoadTest, simulated: Simulated, tmp_path: Path) -> None:
    scenario = scenario_of(tmp_path, {"plain": {}}, OPEN)
    finished = load_test(scenario)
    again = [written(tmp_path, scenario), "--url", simulated.url, "--out", str(finished.folder)]
    assert "holds a run already" in refusal(again)


def test_a_server_is_started_and_ended(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    serve = shlex.join([sys.executable, "-m", "tests.loadtest.simulated_server", "--port", str(port)])
    mine = written(tmp_path, scenario_of(tmp_path, {"plain": {}}, OPEN))
    command.main([mine, "--url", url, "--serve", serve, "--out", str(tmp_path / "run")])
    assert "| plain  | 40/40" in capfd.readouterr().out
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{url}/health")
    assert "the server ended with 3" in refusal(
        [mine, "--url", url, "--serve", "sh -c 'exit 3'", "--out", str(tmp_path)]
    )
    nothing = [mine, "--url", url, "--serve", "no-such-program", "--out", str(tmp_path)]
    assert "--serve no-such-program" in refusal(nothing)


def test_an_end_before_the_first_request_ends_the_server_too(tmp_path: Path) -> None:
    mine = written(tmp_path, scenario_of(tmp_path, {"plain": {}}, OPEN))
    mark = tmp_path / "pid"
    serve = f"sh -c 'echo $$ > {mark}; exec sleep 600'"
    url = f"http://127.0.0.1:{free_port()}"
    arguments = [mine, "--url", url, "--serve", serve, "--out", str(tmp_path / "run")]
    process = subprocess.Popen([sys.executable, "-m", "loadtest.load", *arguments], cwd=ROOT)
    deadline = time.monotonic() + 60
    while not mark.exists() or not mark.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 1
    with pytest.raises(ProcessLookupError):
        os.kill(int(mark.read_text()), 0)


def test_a_server_that_dies_is_reported_with_what_ran(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    port = free_port()
    serve = shlex.join([sys.executable, "-m", "tests.loadtest.simulated_server", "--port", str(port)])
    mine = written(tmp_path, scenario_of(tmp_path, {"plain": {}, "deadly": {"fault": "die"}}, OPEN, warm_up_rounds=0))
    arguments = [mine, "--url", f"http://127.0.0.1:{port}", "--serve", serve, "--out", str(tmp_path / "run")]
    assert f"the server ended with 1 while it was tested; its log is {tmp_path / 'run' / 'server.log'}" in refusal(
        arguments
    )
    assert "disconnected" in capfd.readouterr().out
    assert (tmp_path / "run" / "report.html").exists()


def test_a_server_is_waited_for(tmp_path: Path) -> None:
    mine = written(tmp_path, scenario_of(tmp_path, {"plain": {}}, OPEN))
    port = free_port()
    arguments = [mine, "--url", f"http://127.0.0.1:{port}", "--out", str(tmp_path / "run")]
    assert f"no server at http://127.0.0.1:{port} was healthy within 0.1 s (--wait)" in refusal(
        [*arguments, "--wait", "0.1"]
    )
    waiting = subprocess.Popen(
        [sys.executable, "-m", "loadtest.load", *arguments, "--wait", "60"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    time.sleep(1)
    server = subprocess.Popen([sys.executable, "-m", "tests.loadtest.simulated_server", "--port", str(port)], cwd=ROOT)
    output, _ = waiting.communicate(timeout=120)
    server.kill()
    server.wait()
    assert "| plain  | 40/40" in output


def test_a_server_that_runs_already_is_not_started_again(simulated: Simulated, tmp_path: Path) -> None:
    mine = written(tmp_path, scenario_of(tmp_path, {"plain": {}}, OPEN))
    arguments = [mine, "--url", simulated.url, "--serve", "true", "--out", str(tmp_path / "run")]
    assert "something serves at" in refusal(arguments)


def test_a_report_is_made_again_from_the_journal(load_test: LoadTest, tmp_path: Path) -> None:
    finished = load_test(scenario_of(tmp_path, {"plain": {}}, OPEN))
    before, page = finished.report, finished.page
    (finished.folder / "report.json").unlink()
    (finished.folder / "report.html").unlink()
    command.main(["report", str(finished.folder), "--parquet"])
    assert finished.report == before
    assert finished.page == page


@pytest.fixture
def two_runs(simulated: Simulated, tmp_path: Path) -> list[str]:
    """Runs of which the second has half the TTFT and wrong answers."""
    folders = []
    behaviours = ({"ttft_seconds": 3.2}, {"ttft_seconds": 1.6, "right": False})
    for name, behaviour in zip("ab", behaviours, strict=True):
        mine = written(tmp_path, scenario_of(tmp_path, {"one": behaviour}, OPEN, warm_up_rounds=0))
        folders.append(str(tmp_path / name))
        command.main([mine, "--url", simulated.url, "--out", folders[-1]])
    return folders


def cells_of(output: str) -> list[str]:
    (line,) = [line for line in output.splitlines() if "B against A" in line]
    return [cell.strip() for cell in line.split("|")[1:-1]]


def test_two_runs_are_compared_in_pairs(two_runs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    command.main(["compare", *two_runs])
    output = capsys.readouterr().out
    level, name, pairs, ttft, tpot, latency, score, p, same = cells_of(output)
    assert (level, name, pairs, same) == ("20", "one: B against A", "40", "0%")
    value, _, interval = ttft.partition("x ")
    assert float(value) == pytest.approx(0.5, abs=0.08)
    low, high = json.loads(interval)
    assert 0.3 < low <= high < 0.7
    assert 0.4 < float(tpot.partition("x")[0]) < 2.5
    # 3.2 and 1.6 s to the first token, 0.19 s to the last.
    assert float(latency.partition("x")[0]) == pytest.approx(1.79 / 3.39, abs=0.08)
    assert score == "-1.000"
    assert float(p) < 0.001
    assert "The scenarios of A and B differ in: methods." in output


def test_more_runs_are_each_compared_with_the_first(two_runs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    command.main(["compare", *two_runs, two_runs[0]])
    output = capsys.readouterr().out
    assert output.startswith(f"A: {two_runs[0]}\nB: {two_runs[1]}\nC: {two_runs[0]}\n")
    rows = [line for line in output.splitlines() if " against A" in line]
    assert ["B against A" in row for row in rows] == [True, False]
    assert "1.00x" in rows[1]


def test_runs_of_other_prompts_are_compared_without_pairs(
    two_runs: list[str], simulated: Simulated, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scenario = scenario_of(tmp_path, {"one": {"ttft_seconds": 3.2}}, OPEN, warm_up_rounds=0)
    (tmp_path / "prompts.jsonl").write_text((tmp_path / "prompts.jsonl").read_text().replace("number", "other"))
    command.main([written(tmp_path, scenario), "--url", simulated.url, "--out", str(tmp_path / "c")])
    capsys.readouterr()
    command.main(["compare", two_runs[0], str(tmp_path / "c")])
    _, _, pairs, ttft, _, latency, score, p, _ = cells_of(capsys.readouterr().out)
    assert (pairs, p) == ("not paired", "-")
    assert float(ttft.partition("x")[0]) == pytest.approx(1, abs=0.1)
    assert float(latency.partition("x")[0]) == pytest.approx(1, abs=0.1)
    assert score == "+0.000"


def test_a_trace_is_replayed_with_its_lengths(load_test: LoadTest, simulated: Simulated, tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    lines = [
        {"timestamp_seconds": 50 + 0.2 * n, "input_tokens": 200 + 50 * n, "output_tokens": 3 + n} for n in range(6)
    ]
    trace.write_text("\n".join(map(json.dumps, lines)))
    workloads = [{"name": "replayed", "kind": "trace", "file": str(trace)}]
    load = {"loop": "open", "arrivals": "trace", "trace": str(trace)}
    finished = load_test(scenario_of(tmp_path, {"plain": {}}, load, workloads=workloads, warm_up_rounds=0))
    (stage,) = finished.report["stages"]
    assert [entry["arrival_seconds"] for entry in stage["schedule"]] == pytest.approx([0.2 * n for n in range(6)])
    assert [entry["input_tokens"] for entry in stage["schedule"]] == [200 + 50 * n for n in range(6)]
    assert sorted(request["output_tokens"] for request in finished.requests) == [3 + n for n in range(6)]
    # The simulated server's tokens are words.
    for body, line in zip(simulated.bodies, lines, strict=True):
        assert line["input_tokens"] - 60 <= len(body["messages"][0]["content"].split()) <= line["input_tokens"]
        assert body["ignore_eos"]


def test_tasks_go_out_with_the_beginning_of_their_answer(
    load_test: LoadTest, simulated: Simulated, tmp_path: Path
) -> None:
    workloads = [{"name": "ruler", "kind": "ruler", "input_tokens": 2000, "distinct_prompts": 6}]
    scenario = scenario_of(tmp_path, {"plain": {}}, OPEN, workloads=workloads, warm_up_rounds=0)
    finished = load_test({**scenario, "load": {**OPEN, "requests": 6}})
    assert {request["score"] for request in finished.requests} == {0}
    for body in simulated.bodies:
        assert [message["role"] for message in body["messages"]] == ["user", "assistant"]
        assert body["continue_final_message"]
        assert not body["add_generation_prompt"]


def test_the_table_says_what_it_leaves_out(load_test: LoadTest, tmp_path: Path) -> None:
    asked = {"name": "asked", "kind": "jsonl", "file": str(prompts_file(tmp_path, 40, 5))}
    chats = {"name": "chats", "kind": "text", "input_tokens": 60, "output_tokens": 5}
    scenario = scenario_of(tmp_path, {"one": {}, "other": {}}, OPEN, workloads=[asked, chats], warm_up_rounds=0)
    finished = load_test(scenario)
    others = sum(request["workload"] == "chats" for request in finished.requests)
    assert 0 < others < 40
    assert f"Paired prompts only; the page also shows the {others} requests of other workloads." in finished.output


def test_help_names_the_scenarios() -> None:
    command = [sys.executable, "-m", "loadtest.load", "--help"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    said = " ".join(ended.stdout.split()).replace("- ", "-")
    assert "capacity, long-context, long-needles, mixed-tenants, smoke, soak" in said
