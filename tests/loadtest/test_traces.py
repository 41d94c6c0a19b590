"""Files in the formats of others, small samples of which are made here."""

from __future__ import annotations

import json
import random
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import torch

from loadtest.load.scenario import Scenario
from loadtest.load.settings import ScenarioError
from loadtest.load.workloads.build import PromptMaker
from loadtest.load.workloads.lengths import Choice, Normal
from loadtest.load.workloads.traces import read_share_gpt, read_trace
from tests.loadtest.conftest import LoadTest, Simulated, scenario_of

MOONCAKE = """\
{"timestamp": 3000, "input_length": 1500, "output_length": 20, "hash_ids": [0, 1, 2]}
{"timestamp": 0, "input_length": 1300, "output_length": 52, "hash_ids": [0, 1, 7]}
{"timestamp": 500, "input_length": 700, "output_length": 5, "hash_ids": [8, 9]}
"""
BURST_GPT = """\
Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,472,18,490,Conversation log
45,ChatGPT,1087,230,1317,Conversation log
46,GPT-4,417,0,417,Conversation log
118.5,GPT-4,417,276,693,API log
"""
AZURE = """\
TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
"""
AZURE_2024 = AZURE.replace("6805900", "680590+00:00").replace("9951690", "995169+00:00")
OWN = '{"input_tokens": 9, "output_tokens": 3}\n'


def words(text: str) -> int:
    """Tokens as the simulated server counts them."""
    return len(text.split())


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "trace"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (MOONCAKE, [(0.0, 1300, 52), (0.5, 700, 5), (3.0, 1500, 20)]),
        (BURST_GPT, [(5.0, 472, 18), (45.0, 1087, 230), (118.5, 417, 276)]),
        (AZURE, [(1700158546.68059, 374, 44), (1700158550.995169, 396, 109)]),
        (AZURE_2024, [(1700158546.68059, 374, 44), (1700158550.995169, 396, 109)]),
        (OWN, [(None, 9, 3)]),
    ],
)
def test_traces_are_read_in_their_own_formats(
    tmp_path: Path, text: str, expected: list[tuple[float | None, int, int]]
) -> None:
    found = read_trace(written(tmp_path, text))
    assert [(one.timestamp_seconds, one.input_tokens, one.output_tokens) for one in found] == [
        (time if time is None else pytest.approx(time, abs=1e-5), *counts) for time, *counts in expected
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a,b\n1,2\n", "no trace of Mooncake, BurstGPT or Azure"),
        ("", "no trace"),
        (BURST_GPT.replace("1087", "many"), "line 3: Request tokens"),
        (AZURE.replace("2023-11-16 18:15:50.9951690", "yesterday"), "line 3: TIMESTAMP"),
        (MOONCAKE.replace("700", "0"), "line 3: input_length"),
        (MOONCAKE.replace("3000", "NaN"), "line 1: timestamp"),
        (BURST_GPT.replace(",18,", ",0,").replace(",230,", ",0,").replace(",276,", ",0,"), "no request that generated"),
    ],
)
def test_what_is_no_trace_is_refused(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ScenarioError, match=said):
        read_trace(written(tmp_path, text))


def test_equal_blocks_are_equal_text(tmp_path: Path) -> None:
    path = written(tmp_path, MOONCAKE)
    workload = {"name": "w", "kind": "trace", "file": str(path)}
    scenario = Scenario.model_validate(
        scenario_of(tmp_path, {"plain": {}}, {"loop": "open", "rates": [1], "requests": 1}, workloads=[workload])
    )
    maker = PromptMaker(scenario.workloads[0], words, 1, "chat")
    first, other, second = (str(maker(number).turns[0].content) for number in range(3))
    for text, tokens in ((first, 1300), (other, 700), (second, 1500)):
        assert words(text) == pytest.approx(tokens, rel=0.05)
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))
    assert words(first[:shared]) == pytest.approx(1024, rel=0.05), "two blocks of 512 tokens"
    assert first[:50] != other[:50]
    assert maker(0).shared == maker(2).shared is not None, "of one method they share the prefix cache"


def test_a_trace_is_replayed_faster(load_test: LoadTest, tmp_path: Path) -> None:
    path = str(written(tmp_path, BURST_GPT))
    load = {"loop": "open", "arrivals": "trace", "trace": path, "trace_speed": 100}
    workloads = [{"name": "replayed", "kind": "trace", "file": path}]
    finished = load_test(scenario_of(tmp_path, {"plain": {"tpot_seconds": 0.001}}, load, workloads=workloads))
    assert finished.code == 0, finished.output
    stage = finished.report["stages"][-1]
    assert [entry["arrival_seconds"] for entry in stage["schedule"]] == pytest.approx([0, 0.4, 1.135])
    assert sorted(request["output_tokens"] for request in stage["requests"]) == [18, 230, 276]


def conversation(*remarks: tuple[str, str]) -> dict[str, Any]:
    return {"id": "x", "conversations": [{"from": speaker, "value": value} for speaker, value in remarks]}


SHARE_GPT = [
    conversation(("gpt", "before"), ("human", "one"), ("gpt", "a b c"), ("human", "two"), ("gpt", "d"), ("human", "3")),
    conversation(("human", "never answered")),
    conversation(("user", "four"), ("chatgpt", "e f"), ("chatgpt", "more")),
    conversation(),
]


def test_conversations_of_share_gpt_are_asked_turn_by_turn(
    load_test: LoadTest, simulated: Simulated, tmp_path: Path
) -> None:
    path = written(tmp_path, json.dumps(SHARE_GPT))
    assert read_share_gpt(path) == [[("one", "a b c"), ("two", "d")], [("four", "e f")]]
    workloads = [{"name": "talks", "kind": "sharegpt", "file": str(path), "turns": 2}]
    load = {"loop": "open", "rates": [20], "requests": 2}
    finished = load_test(scenario_of(tmp_path, {"plain": {}}, load, workloads=workloads, warm_up_rounds=0))
    assert finished.code == 0, finished.output
    asked = {body["messages"][-1]["content"]: body for body in simulated.bodies}
    assert {text: body["max_tokens"] for text, body in asked.items()} == {"one": 3, "two": 1, "four": 2}
    assert [message["role"] for message in asked["two"]["messages"]] == ["user", "assistant", "user"]
    assert all(body["ignore_eos"] for body in simulated.bodies)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{}", "no JSON array"),
        ("[", "is no JSON"),
        ('[{"text": "a"}]', "conversation 1: conversations"),
        ('[{"conversations": [{"from": "gpt", "value": "a"}]}]', "no conversation with an answered question"),
    ],
)
def test_what_is_no_file_of_share_gpt_is_refused(tmp_path: Path, content: str, said: str) -> None:
    with pytest.raises(ScenarioError, match=said):
        read_share_gpt(written(tmp_path, content))


def test_users_that_go_away_are_not_counted(load_test: LoadTest, simulated: Simulated, tmp_path: Path) -> None:
    methods = {"a": {"ttft_seconds": 0.05, "tpot_seconds": 0.05}, "b": {"ttft_seconds": 0.06, "tpot_seconds": 0.05}}
    scenario = scenario_of(tmp_path, methods, {"loop": "open", "rates": [40], "requests": 60}, warm_up_rounds=0)
    scenario["workloads"][0]["cancelled"] = {"share": 0.4, "after_seconds": 0.5}
    finished = load_test(scenario)
    assert finished.code == 0, finished.output
    away = [request for request in finished.requests if request["status"] == "cancelled"]
    assert 0 < len(away) < 60
    by_method = [{request["pair"] for request in away if request["method"] == name} for name in methods]
    assert by_method[0] == by_method[1], "the same prompts, whichever the method"
    for request in away:
        assert request["end_seconds"] - request["sent_seconds"] == pytest.approx(0.5, abs=0.2)
    (stage,) = finished.report["summary"]["stages"]
    assert stage["together"]["requests"] == stage["together"]["succeeded"] == 60 - len(away)
    assert f"{len(away)} requests were broken off" in finished.output


def test_lengths_are_drawn_as_they_are_written(generator: torch.Generator) -> None:
    rng = random.Random(int(torch.randint(1 << 30, (1,), generator=generator)))
    normal = [Normal(mean=100, deviation=10, least=80, most=110).draw(rng) for _ in range(2000)]
    assert (min(normal), max(normal)) == (80, 110)
    assert sum(normal) / 2000 == pytest.approx(99, abs=2)
    weighted = [Choice(choice=(1, 9), weights=(3, 1)).draw(rng) for _ in range(4000)]
    assert weighted.count(1) / 4000 == pytest.approx(0.75, abs=0.05)
    with pytest.raises(ValueError, match="one for each of the 2 counts, not 1"):
        Choice(choice=(1, 9), weights=(3,))
