"""Long generations: the conversation, the script that vLLM follows, and what is counted."""

from __future__ import annotations

import json
import random
import re

import pytest
import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality

from loadtest.quality import conversation as conversation_module
from loadtest.quality.conversation import FREE, Answer, Conversation, conversation, is_right
from loadtest.quality.generation import HEADER, Generation, compare, line
from loadtest.text.needles import ANSWER_FORM
from loadtest.text.tokenizer import BEGIN, END, build_tokenizer
from vllm_sparse.quality.script import ScriptProcessor
from vllm_sparse.quality.served_model import SCRIPT_KEY

TOKENIZER = build_tokenizer()
# Where the value's first three digits stand in an answer.
VALUE_AT = len(TOKENIZER.encode(ANSWER_FORM.split(" {value}")[0].format(key="dog"), add_special_tokens=False).ids)


def talk_of(generator: torch.Generator, prompt_tokens: int, generated_tokens: int) -> Conversation:
    seed = int(torch.randint(1 << 30, (1,), generator=generator))
    return conversation(random.Random(seed), TOKENIZER, prompt_tokens, generated_tokens)


def text_of(tokens: list[int]) -> str:
    return TOKENIZER.decode(tokens, skip_special_tokens=False)


def test_a_conversation_is_turns_as_the_chat_template_renders_them(generator: torch.Generator) -> None:
    talk = talk_of(generator, 2500, 400)
    assert 2400 <= len(talk.prompt) <= 2600
    assert 400 - 40 <= len(talk.script) <= 400
    *turns, last = text_of(talk.right).removeprefix(BEGIN).split(f"{END}\n")
    turns.append(last)
    questions, answers = turns[::2], turns[1::2]
    assert len(questions) == len(answers) == len(talk.answers) >= 12
    document, _, questions[0] = questions[0].removeprefix("<|user|>\n").rpartition("\n\n")
    keys = set()
    for question, answer, wanted in zip(questions, answers, talk.answers, strict=True):
        said = answer.removeprefix("<|assistant|>\n")
        found = re.fullmatch(r"The code of the (\w+) is (\d{5})\.", said)
        assert found is not None, said
        key, value = found.groups()
        assert value == wanted.value
        assert f" {key}" in question
        needles = [one for one in re.findall(r"[^.]+\.", document) if f" {key}" in one and value in one]
        assert len(needles) == 1, "the document says it once"
        keys.add(key)
    assert len(keys) == len(answers), "a key asked for again could be copied from the first answer"


def test_the_model_chooses_in_answers_only(generator: torch.Generator) -> None:
    talk = talk_of(generator, 2000, 300)
    free = [position for position, token in enumerate(talk.script) if token == FREE]
    assert free == [position for answer in talk.answers for position in range(*answer.place.indices(300))]
    assert talk.answers[0].start == 0
    generated = talk.right[len(talk.prompt) :]
    assert len(generated) == len(talk.script)
    assert all(is_right(answer, generated, TOKENIZER) for answer in talk.answers)
    wrong = list(generated)
    place = talk.answers[1].place
    other = " 100" if talk.answers[1].value[:3] != "100" else " 101"
    (wrong[place.start + VALUE_AT],) = TOKENIZER.encode(other, add_special_tokens=False).ids
    assert [is_right(answer, wrong, TOKENIZER) for answer in talk.answers] == [n != 1 for n in range(len(talk.answers))]


@pytest.mark.parametrize(("prompt_tokens", "generated_tokens"), [(300, 4000), (4000, 20), (16000, 40000)])
def test_what_does_not_fit_is_refused(prompt_tokens: int, generated_tokens: int) -> None:
    with pytest.raises(ValueError, match=r"hold no turn|do not fit|at most"):
        conversation(random.Random(0), TOKENIZER, prompt_tokens, generated_tokens)


def test_prompts_for_calibration_are_whole_conversations(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["conversation", "--tokens", "1500", "--generated", "100", "--count", "2"])
    conversation_module.main()
    prompts = [json.loads(text) for text in capsys.readouterr().out.splitlines()]
    assert len(set(prompts)) == 2
    for prompt in prompts:
        assert TOKENIZER.encode(prompt).ids[0] == TOKENIZER.token_to_id(BEGIN)
        assert not prompt.startswith(BEGIN)
        assert re.search(r"The code of the \w+ is \d{5}\.$", prompt)


def params(script: list[int] | None) -> SamplingParams:
    return SamplingParams(extra_args=None if script is None else {SCRIPT_KEY: script})


def picks(processor: ScriptProcessor, rows: int) -> list[int]:
    """What greedy sampling takes from logits whose largest is token 9."""
    logits = torch.arange(10.0).expand(rows, -1).clone()
    chosen: list[int] = processor.apply(logits).argmax(1).tolist()
    return chosen


def test_rows_say_what_their_scripts_say() -> None:
    processor = ScriptProcessor(None, torch.device("cpu"), False)
    first: list[int] = []
    second: list[int] = []
    added = [(0, params([3, FREE, 5]), [1], first), (1, params(None), [1], []), (2, params([FREE, 7]), [1], second)]
    processor.update_state(BatchUpdate(3, removed=[], added=added, moved=[]))
    assert picks(processor, 3) == [3, 9, 9]
    first.append(3)
    second.append(9)
    processor.update_state(None)
    assert picks(processor, 3) == [9, 9, 7]
    processor.update_state(BatchUpdate(3, [], [], [(0, 2, MoveDirectionality.SWAP)]))
    assert picks(processor, 3) == [7, 9, 9]
    first.append(9)
    assert picks(processor, 3) == [7, 9, 5]
    processor.update_state(BatchUpdate(2, [0], [], [(2, 0, MoveDirectionality.UNIDIRECTIONAL)]))
    assert picks(processor, 2) == [5, 9]
    first.append(5)
    assert picks(processor, 2) == [9, 9], "a script that has ended says nothing"
    processor.update_state(BatchUpdate(2, [], [(0, params(None), [1], [])], []))
    assert picks(processor, 2) == [9, 9]


def test_a_line_counts_what_it_says() -> None:
    number = TOKENIZER.encode(" 48213", add_special_tokens=False).ids
    other = TOKENIZER.encode(" 48299", add_special_tokens=False).ids
    answers = [Answer(start, number, "48213") for start in (0, 3, 6, 9, 12)]
    script = [FREE, FREE, 7] * 5
    right = [*number, 7] * 5
    talk = Conversation([1], script, answers)
    dense = Generation(right, list(range(15)))
    own = Generation(right[:3] + other + right[5:12] + other + [7], [0] * 15)
    told = Generation(right, [*range(12), 0, 0, 0])
    measured = compare("m", 0.25, [talk], [dense], [own], [told], TOKENIZER)
    # The values share their first token.
    assert measured.common_prefix == 4
    assert measured.same == pytest.approx(8 / 10)
    assert measured.agreement == pytest.approx(12 / 15)
    assert measured.right == [[True, False, True, True, False]]
    assert line(measured) == "| m | 0.250 | 4 | 0.800 | 0.8000 | 1 / 2 | 1 / 2 | 3 / 5 |"
    assert line(measured).count("|") == HEADER.split("\n")[0].count("|")
