"""Files of prompts: wrong lines are named when they are read, unusual ones are sent as they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from loadtest.load.settings import ScenarioError
from loadtest.load.workloads.files import OwnLine, TraceLine, read_lines
from tests.loadtest.conftest import LoadTest, Simulated, scenario_of

OPEN: dict[str, Any] = {"loop": "open", "rates": [20], "requests": 2}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"prompt": "caf\xe9"}', r"line 2, is no UTF-8 \(byte 0xe9\)"),
        (b'{"prompt": }', "line 2, is no JSON"),
        (b'["a"]', r'line 2, is no JSON object: \["a"\]'),
        (b'{"question": "a"}', "line 2: a line needs|line 2: Value error, a line needs either prompt or messages"),
        (b'{"prompt": 3}', "line 2: prompt: Input should be a valid string"),
        (b'{"prompt": "\\ud800"}', "line 2, is no JSON: .*surrogates not allowed"),
        (b'{"prompt": "a", "output_tokens": 0}', "line 2: output_tokens: Input should be greater than 0"),
        (b'{"prompt": "a", "output_tokens": null, "answers": null}', "line 2: answers"),
        (b'{"messages": []}', "line 2: messages"),
        (b'{"messages": [{"role": "user"}]}', "line 2: messages.0.content"),
        (b'{"messages": [{"role": "user", "content": [{"text": "a"}]}]}', "line 2: messages.0.content"),
        (b'{"messages": [{"role": "assistant", "content": "a"}]}', "the last message must be the user's"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: bytes, said: str) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_bytes(b'{"prompt": "good"}\n' + line + b'\n{"prompt": "good"}\n')
    with pytest.raises(ScenarioError, match=said):
        read_lines(path, OwnLine)


def test_numbers_of_a_trace_are_finite(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text('{"input_tokens": 1, "output_tokens": 1, "timestamp_seconds": Infinity}\n')
    with pytest.raises(ScenarioError, match="line 1: timestamp_seconds: Input should be a finite number"):
        read_lines(path, TraceLine)


def test_unusual_lines_are_sent_as_they_are(load_test: LoadTest, simulated: Simulated, tmp_path: Path) -> None:
    """A line separator of Unicode inside a string, a byte order mark, and a message in parts."""
    separated = "one\u2028two\u0085three answer=yes"
    parts = [{"type": "text", "text": "look answer=yes"}, {"type": "image_url", "image_url": {"url": "data:,"}}]
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": parts}]
    lines = [{"prompt": separated, "answers": ["yes"]}, {"messages": messages, "answers": ["yes"]}]
    path = tmp_path / "mine.jsonl"
    path.write_text("\ufeff" + "\n".join(json.dumps(line, ensure_ascii=False) for line in lines), encoding="utf-8")
    workloads = [{"name": "mine", "kind": "jsonl", "file": str(path), "output_tokens": 3}]
    finished = load_test(scenario_of(tmp_path, {"plain": {}}, OPEN, workloads=workloads, warm_up_rounds=0))
    assert finished.code == 0, finished.output
    assert [body["messages"] for body in simulated.bodies] == [[{"role": "user", "content": separated}], messages]
    assert [request["score"] for request in finished.requests] == [1, 1]
    assert [request["planned_input_tokens"] for request in finished.requests] == [4, 4]
