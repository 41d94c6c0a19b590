"""Adapters, agents that call tools, and files of Hugging Face as what a load test sends."""

from __future__ import annotations

import csv
import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pyarrow
import pytest
from pyarrow import parquet
from pydantic import ValidationError

from loadtest.load import command
from loadtest.load.scenario import Scenario
from loadtest.load.settings import ScenarioError
from loadtest.load.workloads.build import PromptMaker
from loadtest.load.workloads.files import AgentLine, OwnLine, local, read_lines
from loadtest.load.workloads.prompt import Prompt, Turn
from tests.loadtest.conftest import LoadTest, Simulated, prompts_file, scenario_of, tables_of
from tests.loadtest.test_load_command import refusal, written
from tests.loadtest.test_traces import words

OPEN: dict[str, Any] = {"loop": "open", "rates": [40], "requests": 60}
MIX = {"share": 0.7, "adapters": {"poet": 3, "sql": 1}}


def test_adapters_answer_their_share(load_test: LoadTest, simulated: Simulated, tmp_path: Path) -> None:
    methods: dict[str, Any] = {"a": {}, "b": {"ttft_seconds": 0.02}}
    scenario = scenario_of(tmp_path, methods, {**OPEN, "requests": 80}, warm_up_rounds=0, tokens=3)
    scenario["workloads"][0]["lora"] = MIX
    finished = load_test(scenario)
    assert finished.code == 0, finished.output
    asked = Counter(body["model"] for body in simulated.bodies)
    assert asked.keys() == {"simulated", "poet", "sql"}, "the model without a parent is the one to test"
    assert asked["poet"] > asked["sql"] > 0
    assert 0.5 < (asked["poet"] + asked["sql"]) / 80 < 0.9
    by_method = [
        {request["pair"]: request["adapter"] for request in finished.requests if request["method"] == name}
        for name in methods
    ]
    assert by_method[0] == by_method[1], "the same prompts, whichever the method"
    (table,) = [one for one in tables_of(finished.page) if one[1][0] == "no adapter"]
    expected = [f"{asked[name]} of {asked[name]}" for name in ("simulated", "poet", "sql")]
    assert [row[1] for row in table[1:]] == expected
    with (finished.folder / "requests.csv").open(newline="") as file:
        exported = Counter(row["adapter"] for row in csv.DictReader(file))
    assert exported == {"": asked["simulated"], "poet": asked["poet"], "sql": asked["sql"]}


def test_a_scenario_without_adapters_has_no_table_of_them(load_test: LoadTest, tmp_path: Path) -> None:
    finished = load_test(scenario_of(tmp_path, {"a": {}}, {**OPEN, "requests": 4}, warm_up_rounds=0, tokens=3))
    assert "By LoRA adapter" not in finished.page


def test_adapters_that_the_server_does_not_have_are_refused(simulated: Simulated, tmp_path: Path) -> None:
    scenario = scenario_of(tmp_path, {"a": {}}, OPEN)
    scenario["workloads"][0]["lora"] = {"adapters": {"poet": 1, "painter": 1}}
    said = refusal([written(tmp_path, scenario), "--url", simulated.url, "--out", str(tmp_path / "run")])
    assert "workload 'asked': lora.adapters: painter: the server has simulated, poet, sql" in said
    scenario["workloads"][0]["lora"] = {"adapters": {}}
    with pytest.raises(ValidationError, match=r"lora\.adapters"):
        Scenario.model_validate(scenario)


def test_a_prompt_of_another_adapter_is_another_prompt() -> None:
    plain, adapted = (Prompt("p", (Turn("hello", 3),), 1, adapter=adapter) for adapter in (None, "poet"))
    assert plain.digest != adapted.digest


TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]
CALL = {"id": "1", "type": "function", "function": {"name": "look", "arguments": '{"at": "the sea"}'}}
RUN = [
    {"role": "system", "content": "Look before you answer."},
    {"role": "user", "content": "What is there?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "1", "content": "a boat"},
    {"role": "assistant", "content": "one two three"},
    {"role": "user", "content": "And now?"},
    {"role": "assistant", "content": "four five"},
    {"role": "user", "content": "never answered"},
]


def runs_file(tmp_path: Path, *runs: Any) -> Path:
    path = tmp_path / "runs.jsonl"
    path.write_text("\n".join(map(json.dumps, runs)))
    return path


def test_runs_of_agents_are_sent_as_they_were(load_test: LoadTest, simulated: Simulated, tmp_path: Path) -> None:
    path = runs_file(tmp_path, {"messages": RUN, "tools": TOOLS}, {"messages": RUN[:3]})
    workload = {"name": "agents", "kind": "agents", "file": str(path), "think_seconds": 0.4, "tool_seconds": 0.1}
    scenario = scenario_of(tmp_path, {"plain": {}}, {**OPEN, "requests": 2}, workloads=[workload], warm_up_rounds=0)
    finished = load_test(scenario)
    assert finished.code == 0, finished.output
    bodies = sorted((body for body in simulated.bodies if "tools" in body), key=lambda body: len(body["messages"]))
    (without,) = [body for body in simulated.bodies if "tools" not in body]
    assert without["messages"] == RUN[:2]
    # The recorded answers, not those of the server: all methods read the same.
    assert [body["messages"] for body in bodies] == [RUN[:2], RUN[:4], RUN[:6]]
    assert all((body["tools"], body["tool_choice"], body["ignore_eos"]) == (TOOLS, "none", True) for body in bodies)
    # A word is a token here.
    assert [body["max_tokens"] for body in bodies] == [words(json.dumps(CALL["function"])), 3, 2]
    turns = sorted(
        (request for request in finished.requests if request["session"] == bodies_session(finished.requests)),
        key=lambda request: request["turn"],
    )
    pauses = [after["intended_seconds"] - before["end_seconds"] for before, after in itertools.pairwise(turns)]
    assert pauses == pytest.approx([0.1, 0.4], abs=0.05), "a tool's time and a user's"
    assert [turn["score"] for turn in turns] == [None] * 3


def bodies_session(requests: list[dict[str, Any]]) -> int:
    """The session of several turns."""
    return int(next(request["session"] for request in requests if request["turn"]))


def test_runs_of_agents_share_their_beginning(tmp_path: Path) -> None:
    path = runs_file(tmp_path, {"messages": RUN, "tools": TOOLS}, {"messages": RUN[:5], "tools": TOOLS})
    workload = {"name": "w", "kind": "agents", "file": str(path), "turns": 2}
    scenario = Scenario.model_validate(scenario_of(tmp_path, {"plain": {}}, OPEN, workloads=[workload]))
    maker = PromptMaker(scenario.workloads[0], words, 1, "chat")
    assert maker.distinct == 2
    assert [len(maker(number).turns) for number in range(2)] == [2, 2], "turns at most"
    assert maker(0).shared == maker(1).shared is not None
    assert maker(0).input_tokens == words(json.dumps([TOOLS, RUN[:2]]))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"messages": RUN[:2]}, "has one of the assistant's"),
        ({"messages": RUN[2:]}, "begins with another message than the assistant's"),
        ({"messages": [*RUN[:5], RUN[4]]}, "messages 5 and 6 are both the assistant's"),
        ({"messages": [RUN[0], {"role": "assistant"}]}, "neither content nor tool_calls"),
        ({"messages": [RUN[0], {"role": "robot", "content": "x"}]}, "messages.1.role"),
        ({"messages": RUN, "tools": {}}, "tools"),
    ],
)
def test_what_is_no_run_of_an_agent_is_refused(tmp_path: Path, line: Any, said: str) -> None:
    with pytest.raises(ScenarioError, match=said) as refused:
        read_lines(runs_file(tmp_path, {"messages": RUN}, line), AgentLine)
    assert "line 2" in str(refused.value)


def test_agents_need_the_chat_endpoint(tmp_path: Path) -> None:
    workload = {"name": "w", "kind": "agents", "file": str(runs_file(tmp_path, {"messages": RUN}))}
    scenario = scenario_of(tmp_path, {"plain": {}}, OPEN, workloads=[workload], endpoint="completions")
    with pytest.raises(ValidationError, match="conversations need endpoint: chat"):
        Scenario.model_validate(scenario)


ROWS = [{"question": "answer=yes?", "gold": "yes", "prompt": None}, {"question": "what?", "gold": None, "prompt": None}]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of Hugging Face that holds one data set, and no way to the network."""
    snapshot = tmp_path / "hub" / "datasets--people--talks" / "snapshots" / ("a" * 40)
    (snapshot / "data").mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("a" * 40)
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), snapshot / "data" / "test.parquet")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return snapshot


def test_a_file_of_hugging_face_is_read(hub: Path, simulated: Simulated, tmp_path: Path) -> None:
    place = "hf://datasets/people/talks/data/test.parquet"
    assert local(place) == hub / "data" / "test.parquet"
    workload = {"name": "w", "kind": "jsonl", "file": place, "columns": {"prompt": "question", "answers": "gold"}}
    scenario = scenario_of(tmp_path, {"a": {}}, {**OPEN, "requests": 2}, workloads=[workload], warm_up_rounds=0)
    command.main([written(tmp_path, scenario), "--url", simulated.url, "--out", str(tmp_path / "run")])
    assert {body["messages"][0]["content"] for body in simulated.bodies} == {"answer=yes?", "what?"}
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert sorted(str(request["score"]) for request in report["stages"][0]["requests"]) == ["1.0", "None"]
    assert report["run"]["scenario"]["workloads"][0]["file"] == place, "the report names what others can fetch"


def test_files_that_cannot_be_fetched_are_named(hub: Path, tmp_path: Path) -> None:
    with pytest.raises(ScenarioError, match=r"hf://datasets/people/talks/none\.json cannot be fetched"):
        local("hf://datasets/people/talks/none.json")
    assert local("hf://datasets/people/talks@main/data/test.parquet") == hub / "data" / "test.parquet"
    assert local("some/file.json") == Path("some/file.json")
    workload = {"name": "w", "kind": "sharegpt", "file": "hf://people/talks/x.json"}
    with pytest.raises(ValidationError, match="hf://datasets/OWNER/NAME/FILE"):
        Scenario.model_validate(scenario_of(tmp_path, {"a": {}}, OPEN, workloads=[workload]))


def test_what_is_no_parquet_is_refused(tmp_path: Path) -> None:
    path = prompts_file(tmp_path, 2, 3).rename(tmp_path / "prompts.parquet")
    with pytest.raises(ScenarioError, match=r"prompts\.parquet cannot be read as Parquet"):
        read_lines(path, OwnLine)
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    with pytest.raises(ScenarioError, match="row 1: Value error, a line needs either prompt or messages"):
        read_lines(path, OwnLine)
