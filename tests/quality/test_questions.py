"""A user's own questions: what is read, and which words meet what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vllm_sparse.quality.questions import read_questions


def test_questions_are_read_with_their_defaults(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    lines = [
        {"prompt": "One\u2028two?", "answers": ["2"]},
        {
            "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How many?"}],
            "answers": ["7"],
            "kind": "counts",
            "answer_prefix": "There are",
            "answer_tokens": 8,
            "scoring": "number",
        },
    ]
    path.write_text("\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n", encoding="utf-8")
    first, second = read_questions(path)
    assert first.messages == ({"role": "user", "content": "One\u2028two?"},)
    assert (first.kind, first.answers, first.answer_tokens, first.scoring) == ("own", ("2",), 128, "share_found")
    assert (second.kind, second.answer_prefix, second.answer_tokens, second.scoring) == (
        "counts",
        "There are",
        8,
        "number",
    )
    assert len(second.messages) == 2


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("{", "line 2"),
        ("[]", "JSON object"),
        ('{"answers": ["1"]}', "messages or prompt"),
        ('{"prompt": "x", "messages": [], "answers": ["1"]}', "messages or prompt"),
        ('{"prompt": "x"}', "answers"),
        ('{"prompt": "x", "answers": []}', "answers"),
        ('{"prompt": "x", "answers": [1]}', "answers"),
        ('{"prompt": "x", "answers": ["1"], "answer_tokens": 0}', "answer_tokens"),
        ('{"prompt": "x", "answers": ["1"], "scoring": "best"}', "scoring"),
        ('{"prompt": "x", "answers": ["1"], "answr": 1}', "answr"),
        ('{"messages": [{"role": "user"}], "answers": ["1"]}', "content"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: str, named: str) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text('{"prompt": "right", "answers": ["1"]}\n' + line + "\n")
    with pytest.raises(ValueError, match="line 2") as raised:
        read_questions(path)
    assert named in str(raised.value)


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text("\n")
    with pytest.raises(ValueError, match="no question"):
        read_questions(path)
