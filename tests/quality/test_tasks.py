"""Tasks: lengths, what documents share, that each question has one answer, and how answers are scored."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vllm_sparse.quality.corpus import Corpus
from vllm_sparse.quality.tasks.documents import FAMILIES, KINDS, build_document
from vllm_sparse.quality.tasks.scoring import score, words_of
from vllm_sparse.quality.tasks.task import CountTokens, Document, Scoring, Task


def counter(chars_per_token: float) -> CountTokens:
    """A tokenizer that knows lengths, and a template of 20 tokens and of 5 each message."""

    def count(messages: Sequence[Mapping[str, str]]) -> int:
        return 20 + sum(5 + int(len(message["content"]) / chars_per_token) for message in messages)

    return count


def words_and_signs(messages: Sequence[Mapping[str, str]]) -> int:
    """A tokenizer to which each digit, sign and run of four letters is a token, as to those of small models."""
    return sum(5 + len(re.findall(r"\d|[^\W\d]{1,4}|[^\w\s]|\n", message["content"])) for message in messages)


def document(family: str, number: int, tokens: int = 4096, seed: int = 5) -> Document:
    return build_document(family, seed, number, tokens, Corpus.installed(), words_and_signs, KINDS)


def task(kind: str, number: int, tokens: int = 4096) -> tuple[Task, str]:
    """A task, and the text that it asks about."""
    found = build_document(KINDS[kind], 5, number, tokens, Corpus.installed(), words_and_signs, [kind]).tasks[0]
    text = "\n\n".join(message["content"] for message in found.messages)
    return found, text.rpartition("\n\n")[0]


def occurrences(answer: str, text: str) -> int:
    return len(re.findall(rf"(?<!\w){re.escape(answer)}(?!\w)", text))


def test_every_kind_of_the_issue_is_there() -> None:
    assert set(KINDS) >= {
        *("one_needle", "one_of_many_keys", "several_values", "several_keys", "function_lookup", "json_lookup"),
        *("variable_chain", "frequent_topics", "counting", "two_places", "copy_passage", "conversation"),
    }


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=10)
@example(seed=131211629, number=5, tokens=2048, count=words_and_signs)
@given(
    seed=st.integers(0, 2**32),
    number=st.integers(0, 99),
    tokens=st.sampled_from([2048, 3000, 8192]),
    count=st.sampled_from([counter(2.3), counter(3.3), counter(4.6), words_and_signs]),
)
def test_lengths_are_met_with_few_counts(family: str, seed: int, number: int, tokens: int, count: CountTokens) -> None:
    counted = []

    def counting(messages: Sequence[Mapping[str, str]]) -> int:
        counted.append(messages)
        return count(messages)

    tasks = build_document(family, seed, number, tokens, Corpus.installed(), counting, KINDS).tasks
    assert len(counted) <= 6
    lengths = [
        count(each.messages)
        + count([{"role": "assistant", "content": each.answer_prefix}])
        - count([{"role": "assistant", "content": ""}])
        + each.answer_tokens
        for each in tasks
    ]
    assert 0.97 * tokens <= max(lengths) <= tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_arguments_give_equal_documents_and_other_numbers_and_seeds_others(family: str) -> None:
    assert document(family, 3) == document(family, 3)
    first, other, seeded = document(family, 3), document(family, 4), document(family, 3, seed=6)
    for tasks in zip(first.tasks, other.tasks, seeded.tasks, strict=True):
        assert len({each.messages[0]["content"] for each in tasks}) == 3
        if tasks[0].kind != "counting":
            assert len({each.answers for each in tasks}) == 3


@pytest.mark.parametrize("family", FAMILIES)
def test_tasks_of_a_document_differ_in_their_questions_alone(family: str) -> None:
    tasks = document(family, 0).tasks
    assert {each.kind for each in tasks} == set(FAMILIES[family])
    assert all(each.messages[:-1] == tasks[0].messages[:-1] for each in tasks)
    texts = {each.messages[-1]["content"].rpartition("\n\n")[0] for each in tasks}
    assert len(texts) == 1
    for each in tasks:
        assert each.messages[-1]["role"] == "user"
        assert each.answer_prefix == each.answer_prefix.rstrip()
        # A whole answer, in the words of the task, is right; nothing said is not.
        assert score(each, " ".join(each.answers)) == 1
        assert score(each, "") == 0


def test_only_the_kinds_asked_for_are_planted() -> None:
    _, text = task("one_needle", 0)
    assert "magic number" in text
    assert "bell rang" not in text


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("counting", "frequent_topics")])
@pytest.mark.parametrize("number", range(3))
def test_what_is_asked_for_stands_once_in_the_text(kind: str, number: int) -> None:
    found, text = task(kind, number)
    for answer in found.answers:
        expected = 2 if kind in ("two_places", "variable_chain") and not answer.isdigit() else 1
        assert occurrences(answer, text) == expected, answer


@pytest.mark.parametrize("number", range(5))
def test_the_bell_rang_as_often_as_is_answered(number: int) -> None:
    found, text = task("counting", number)
    assert text.count("A bell rang") == int(found.answers[0])


@pytest.mark.parametrize("number", range(5))
def test_the_three_topics_are_the_most_frequent(number: int) -> None:
    found, text = task("frequent_topics", number, 2048)
    times = Counter(re.findall(r"^\[(\w+)\] ", text, re.MULTILINE)).most_common()
    assert {label for label, _ in times[:3]} == set(found.answers)
    assert times[2][1] > times[3][1]


@pytest.mark.parametrize("number", range(5))
def test_the_object_is_json_and_has_the_answer(number: int) -> None:
    found, text = task("json_lookup", number)
    records = json.loads(text[text.index("{") :])
    key = json.loads(found.answer_prefix.partition(":")[0])
    assert str(records[key]["number"]) == found.answers[0]
    numbers = [record["number"] for record in records.values()]
    assert len(set(numbers)) == len(numbers) > 20


@pytest.mark.parametrize("number", range(5))
def test_the_function_asked_for_is_the_only_one_of_its_name(number: int) -> None:
    found, text = task("function_lookup", number)
    names = re.findall(r"^(?:async )?def (\w+)", text, re.MULTILINE)
    assert len(set(names)) == len(names) > 5
    assert text.count(f"{found.answer_prefix}{found.answers[0]}") == 1


@pytest.mark.parametrize("number", range(5))
def test_the_chain_leads_from_the_variable_to_the_number(number: int) -> None:
    found, text = task("variable_chain", number)
    assignments = dict(re.findall(r"^([a-z]+_[a-z]+) = ([a-z]+_[a-z]+|\d{5})$", text, re.MULTILINE))
    seen = []
    at = found.answer_prefix.split("`")[1]
    while at in assignments:
        at = assignments[at]
        seen.append(at)
    assert tuple(seen) == found.answers
    # In order: each variable is assigned before it is read.
    places = [text.index(f"\n{name} = ") for name in found.answers[-2::-1]]
    assert places == sorted(places)


@pytest.mark.parametrize("number", range(5))
def test_a_passage_is_copied_from_where_its_beginning_ends(number: int) -> None:
    found, text = task("copy_passage", number)
    assert text.count(f"{found.answer_prefix} {found.answers[0]}") == 1
    # The question ends before the answer begins: what is to be copied stands in the text alone.
    assert found.answer_prefix not in found.messages[-1]["content"].rpartition("\n\n")[2]


@pytest.mark.parametrize("number", range(6))
def test_a_conversation_alternates_and_each_turn_tells_a_fact(number: int) -> None:
    found, _ = task("conversation", number)
    roles = [message["role"] for message in found.messages]
    assert roles == ["user", "assistant"] * 6 + ["user"]
    told = [message["content"] for message in found.messages[:-1:2]]
    assert all("Please remember this" in each for each in told)
    assert found.answers[0] in told[number]


@pytest.mark.parametrize("kind", ["one_needle", "one_of_many_keys", "copy_passage", "function_lookup", "json_lookup"])
def test_ten_documents_meet_all_depths_and_say_which(kind: str) -> None:
    depths = []
    for number in range(10):
        found, text = task(kind, number, 8192)
        assert found.depth is not None
        depths.append(found.depth)
        answer = text.index(found.answers[0]) / len(text)
        assert answer == pytest.approx(found.depth, abs=0.1)
    assert max(abs(depth - (place + 0.5) / 10) for place, depth in enumerate(sorted(depths))) < 0.12


@pytest.mark.parametrize(
    ("family", "tokens", "kinds", "message"),
    [
        ("prose", 2048, ["json_lookup"], "none belongs to the family prose"),
        ("prose", 256, KINDS, "256 tokens are too few for the kinds one_needle.*ask for a greater length"),
        ("topics", 300, KINDS, "frequent_topics needs 20 pieces of text"),
        ("prose", 10**6, KINDS, "installed text: a document of 1,000,000 tokens .* characters of different text"),
    ],
)
def test_what_cannot_be_built_is_refused(family: str, tokens: int, kinds: Sequence[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_document(family, 0, 0, tokens, Corpus.installed(), words_and_signs, kinds)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_without_the_text_that_is_needed_is_named(family: str) -> None:
    corpus = Corpus("--text notes", (), (), {"code": (), "prose": ()})
    with pytest.raises(ValueError, match=r"^--text notes: "):
        build_document(family, 0, 0, 2048, corpus, words_and_signs, KINDS)


def asked(scoring: Scoring, *answers: str) -> Task:
    return Task("kind", (), "", answers, 16, scoring)


numbers = st.integers(10000, 99999).map(str)
some_words = st.lists(st.text("abcdef", min_size=1, max_size=4), min_size=1, max_size=20)


@given(st.lists(numbers, min_size=1, max_size=6, unique=True), st.data())
def test_the_share_of_answers_said_is_found(answers: list[str], data: st.DataObject) -> None:
    said = data.draw(st.lists(st.sampled_from(answers), unique=True))
    joined = data.draw(st.sampled_from([", ", " and ", "\n- ", "; "])).join(said)
    assert score(asked("share_found", *answers), f" {joined}.") == len(said) / len(answers)


@given(numbers, st.sampled_from(["1{}", "{}1", "a{}", "{}_", "0{}"]))
def test_a_number_inside_another_is_not_found(number: str, pattern: str) -> None:
    assert score(asked("share_found", number), f"It is {pattern.format(number)}.") == 0


@pytest.mark.parametrize(
    ("scoring", "answer", "text", "expected"),
    [
        ("share_found", "amber lantern", "The AMBER Lantern!", 1),
        ("share_found", "lantern", "lanterns", 0),
        ("share_found", "12345", "12,345 coins", 1),
        ("share_found", "12345", "112,345 coins", 0),
        ("number", "7", " 7 times, not 8", 1),
        ("number", "7", " 8 times, not 7", 0),
        ("number", "7", " 7.5", 0),
        ("number", "7", " 17", 0),
        ("number", "7", " -7", 0),
        ("number", "7", " **7**.", 1),
        ("number", "7", " none", 0),
        ("words_in_order", "one two three four", "One, two; FOUR", 0.75),
        ("words_in_order", "one two three four", "zero five one two", 0.5),
        ("words_in_order", "one two three four", "zero five six seven one two three four", 0),
        ("words_in_order", "one two three four", "four three two one", 0.25),
    ],
)
def test_scores(scoring: Scoring, answer: str, text: str, expected: float) -> None:
    assert score(asked(scoring, answer), text) == expected


@given(some_words, some_words)
def test_words_in_order_are_a_share_that_more_text_never_lowers(expected: list[str], said: list[str]) -> None:
    task = asked("words_in_order", " ".join(expected))
    scores = [score(task, " ".join(said[:end])) for end in range(len(said) + 1)]
    assert scores == sorted(scores)
    assert 0 <= scores[-1] <= 1
    assert (scores[-1] == 1) == (said[: len(expected)] == expected)


@given(some_words, st.data())
def test_a_word_left_out_costs_one_word(expected: list[str], data: st.DataObject) -> None:
    left_out = data.draw(st.integers(0, len(expected) - 1))
    said = " ".join(expected[:left_out] + expected[left_out + 1 :])
    assert score(asked("words_in_order", " ".join(expected)), said) == (len(expected) - 1) / len(expected)
    assert words_of(said) == said.split()
