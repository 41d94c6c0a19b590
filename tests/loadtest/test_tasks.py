"""RULER-style tasks: the answer is in the text and nowhere else, and the length is met."""

from __future__ import annotations

import random
import re
from collections import Counter

import pytest
import torch

from loadtest.load.scenario import Scenario
from loadtest.load.settings import ScenarioError
from loadtest.load.workloads.build import PromptMaker
from loadtest.quality.tasks.ruler import TASKS
from loadtest.quality.tasks.task import Task, fit, share_found
from loadtest.text.tokenizer import build_tokenizer, count_tokens

TOKENIZER = build_tokenizer()


def count(text: str) -> int:
    return count_tokens(TOKENIZER, text)


def seed_of(generator: torch.Generator) -> int:
    return int(torch.randint(1 << 30, (1,), generator=generator))


@pytest.mark.parametrize("name", list(TASKS))
@pytest.mark.parametrize("tokens", [3000, 9000])
def test_a_task_fills_its_length(name: str, tokens: int, generator: torch.Generator) -> None:
    seed = seed_of(generator)
    task = TASKS[name](seed, tokens, count)
    assert task == TASKS[name](seed, tokens, count)
    assert task.content != TASKS[name](seed + 1, tokens, count).content
    used = count(task.content) + count(task.answer_prefix) + task.answer_tokens
    # A unit of the coded text is a step in the counts of many words.
    assert tokens * 0.93 <= used <= tokens
    assert all(answer in task.content for answer in task.answers)
    assert share_found(task.answers, " ".join(task.answers).upper()) == 1
    assert share_found(task.answers, "") == 0


@pytest.mark.parametrize(("name", "answers"), [("niah_single", 1), ("niah_multi_value", 4), ("niah_multi_query", 4)])
def test_needles_say_what_is_asked(name: str, answers: int, generator: torch.Generator) -> None:
    task = TASKS[name](seed_of(generator), 3000, count)
    needles = re.findall(r"One of the special numbers for (\S+) is: (\d{7})\.", task.content)
    asked = task.content.rpartition("\n\n")[2]
    assert sorted(value for key, value in needles if key in asked) == sorted(task.answers)
    assert len(needles) == len(task.answers) == answers
    assert len({key for key, _ in needles}) == (4 if name == "niah_multi_query" else 1)


def test_a_haystack_of_needles_has_one_that_is_asked(generator: torch.Generator) -> None:
    task = TASKS["niah_multi_key"](seed_of(generator), 9000, count)
    needles = dict(re.findall(r"One of the special uuids for (\S+) is: (\S+)\.", task.content))
    asked = task.content.rpartition("\n\n")[2]
    assert len(needles) > 40
    assert [value for key, value in needles.items() if key in asked] == list(task.answers)


def test_a_chain_leads_to_the_number(generator: torch.Generator) -> None:
    task = TASKS["variable_tracking"](seed_of(generator), 3000, count)
    value = re.findall(r"\d{5}", task.content)[-1]
    held = {name for name, number in re.findall(r"VAR (\w+) = (\d+)\.", task.content) if number == value}
    for name, source in re.findall(r"VAR (\w+) = VAR (\w+)\.", task.content):
        if source in held:
            held.add(name)
    assert held == set(task.answers)
    assert len(held) == 5


def test_frequent_words_are_the_most_frequent(generator: torch.Generator) -> None:
    task = TASKS["frequent_words"](seed_of(generator), 9000, count)
    words = Counter(re.findall(r"\b[a-z]{6}\b", task.content.split("\n\n")[1]))
    ranked = words.most_common(4)
    assert [word for word, _ in ranked[:3]] == list(task.answers)
    assert ranked[2][1] > ranked[3][1], "the third is clear"
    with pytest.raises(ValueError, match="too few"):
        TASKS["frequent_words"](1, 280, count)


def test_filler_is_fitted_to_any_price(generator: torch.Generator) -> None:
    rng = random.Random(seed_of(generator))

    def filler_of(units: int) -> Task:
        return Task("x" * units, "", (), 0)

    for _ in range(50):
        price, fixed, target = rng.randint(1, 40), rng.randint(0, 50), rng.randint(200, 5000)

        def price_of(text: str, price: int = price, fixed: int = fixed) -> int:
            return fixed + price * len(text) if text else 0

        task = fit(filler_of, target, price_of, rng.randint(1, 900))
        assert target - max(price, 0.005 * target) <= price_of(task.content) <= target
    with pytest.raises(ValueError, match="does not fit into 10 tokens"):
        fit(lambda units: Task("x" * units, "", (), 50), 10, len, 4)


def scenario_of(workload: dict[str, object], endpoint: str = "chat") -> Scenario:
    return Scenario.model_validate(
        {
            "description": "test",
            "endpoint": endpoint,
            "methods": {"dense": {}},
            "workloads": [workload],
            "load": {"loop": "closed", "concurrency": [1], "requests": 1},
            "slo": {"ttft_seconds": 1, "tpot_seconds": 1},
        }
    )


@pytest.mark.parametrize(
    "workload",
    [
        {"name": "a", "kind": "needle", "input_tokens": {"choice": [1000, 2000]}},
        {"name": "a", "kind": "ruler", "input_tokens": {"uniform": [2000, 3000]}},
        {"name": "a", "kind": "documents", "input_tokens": 2000, "turns": 2},
        {"name": "a", "kind": "text", "input_tokens": {"median": 500, "sigma": 1, "most": 2000}, "output_tokens": 9},
    ],
    ids=lambda workload: workload["kind"],
)
def test_prompts_have_their_length_and_come_again(workload: dict[str, object]) -> None:
    scenario = scenario_of(workload)
    makers = [PromptMaker(scenario.workloads[0], count, scenario.seed, scenario.endpoint) for _ in range(2)]
    prompts = [makers[0](number) for number in range(12)]
    assert [one.digest for one in prompts] == [makers[1](number).digest for number in range(12)]
    assert makers[0](100) is makers[0](0), "100 distinct ones, then they repeat"
    for prompt in prompts:
        turn = prompt.turns[0]
        # A task leaves room for its answer.
        assert isinstance(turn.content, str)
        tokens = count(turn.content) + (turn.max_tokens if workload["kind"] == "ruler" else 0)
        assert prompt.input_tokens - max(160, 0.08 * prompt.input_tokens) <= tokens <= 1.03 * prompt.input_tokens + 20
        if workload["kind"] != "text":
            assert turn.score is not None
            assert turn.score("no idea") == 0


def test_a_prompt_that_does_not_fit_is_refused() -> None:
    scenario = scenario_of({"name": "tiny", "kind": "documents", "input_tokens": 60})
    with pytest.raises(ScenarioError, match="workload 'tiny', prompt 0: 8 needles and the question do not fit into 28"):
        PromptMaker(scenario.workloads[0], count, scenario.seed, scenario.endpoint)(0)
