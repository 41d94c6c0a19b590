"""Rules of idealised decode methods: their lists, and the table of one prompt."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from loadtest.quality.decode_losses import Rule, choose, main, merged, page_bounds

MODEL = Path(__file__).parents[2] / "loadtest" / "model" / "weights"
KV_HEADS, GROUP, STEPS, TOKENS, HEAD_SIZE, SCALE = 2, 3, 5, 203, 16, 0.3


def forced(**knobs: Any) -> Rule:
    """A rule that forces few tokens."""
    return Rule(sink_tokens=2, recent_tokens=4, **knobs)


@pytest.fixture
def layer(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key and scores."""
    query = torch.randn(KV_HEADS, GROUP, STEPS, HEAD_SIZE, generator=generator) * 2
    key = torch.randn(KV_HEADS, TOKENS, HEAD_SIZE, generator=generator)
    scores = query @ key.transpose(1, 2).unsqueeze(1) * SCALE
    future = torch.arange(TOKENS) > torch.arange(TOKENS - STEPS, TOKENS).unsqueeze(1)
    return query, key, scores.masked_fill(future, -torch.inf)


def lists(rule: Rule, layer: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> torch.Tensor:
    query, key, scores = layer
    return choose(rule, query, key, scores, SCALE)


@pytest.mark.parametrize(
    "rule",
    [
        forced(budget_tokens=32),
        forced(budget_tokens=32, merge="none"),
        forced(budget_tokens=32, choose_every_steps=2),
        forced(budget_tokens=32, page_tokens=8),
        forced(budget_tokens=32, page_tokens=8, page_scores="exact"),
        forced(budget_tokens=32, page_tokens=8, candidate_factor=2),
        forced(budget_tokens=32, coverage=0.5, merge="mean"),
    ],
    ids=str,
)
def test_lists_hold_what_is_forced_and_nothing_of_the_future(
    rule: Rule, layer: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
) -> None:
    listed = lists(rule, layer)
    for step in range(STEPS):
        newest = TOKENS - STEPS + step
        found = listed[:, :, step]
        assert found[..., :2].all()
        assert found[..., newest - 3 : newest + 1].all()
        assert not found[..., newest + 1 :].any()
        # Tokens that join an old list come on top of its budget.
        assert (found.sum(2) <= 32 + rule.choose_every_steps - 1).all()


def test_exact_lists_are_the_best_of_the_merged_scores(
    layer: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    """Of the maximum or the mean of probabilities, or the maximum of scores; each step alone."""
    scores = layer[2]
    probabilities = scores.double().softmax(3)
    values = {"max": probabilities.amax(1), "mean": probabilities.mean(1), "raw_max": scores.double().amax(1)}
    found = {}
    for merge, value in values.items():
        rule = Rule(budget_tokens=20, sink_tokens=0, recent_tokens=0, merge=merge)  # type: ignore[arg-type]
        found[merge] = lists(rule, layer)[:, 0]
        for step in range(STEPS):
            newest = TOKENS - STEPS + step
            others = value[:, step].masked_fill(torch.arange(TOKENS) == newest, -torch.inf).topk(19, 1).indices
            expected = torch.zeros(KV_HEADS, TOKENS, dtype=torch.bool).scatter_(1, others, True)
            expected[:, newest] = True
            assert torch.equal(found[merge][:, step], expected)
    assert not torch.equal(found["max"], found["mean"])


def test_bounds_of_pages_are_never_below_their_scores(layer: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    query, key, _ = layer
    exact = query @ key.transpose(1, 2).unsqueeze(1)
    bounds = page_bounds(query, key, 8).repeat_interleave(8, 3)[..., :TOKENS]
    assert (bounds >= exact - 1e-4).all()
    single = page_bounds(query, key, 1)
    assert torch.allclose(single, exact, atol=1e-4), "of one key the bound is its score"


def test_enough_candidates_are_everything(layer: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    exact = forced(budget_tokens=20)
    few, many = (forced(budget_tokens=20, page_tokens=8, candidate_factor=factor) for factor in (1, 11))
    assert torch.equal(lists(many, layer), lists(exact, layer))
    assert not torch.equal(lists(few, layer), lists(exact, layer))


def test_a_list_ends_at_its_coverage(layer: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    """It holds the share, and would not without its last token."""
    rule = Rule(budget_tokens=TOKENS, coverage=0.7, merge="mean", sink_tokens=0, recent_tokens=0)
    mass = merged(layer[2], "mean").exp()
    listed = lists(rule, layer)
    kept = (mass * listed).sum(3)
    least = mass.masked_fill(~listed, torch.inf)
    newest = torch.arange(TOKENS - STEPS, TOKENS).unsqueeze(1) == torch.arange(TOKENS)
    assert (kept >= 0.7 - 1e-5).all()
    assert (kept - least.masked_fill(newest, torch.inf).amin(3) < 0.7 + 1e-5).all()


def test_old_lists_are_those_of_the_step_that_chose(layer: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    fresh = lists(Rule(budget_tokens=20, sink_tokens=0, recent_tokens=0), layer)
    old = lists(Rule(budget_tokens=20, sink_tokens=0, recent_tokens=0, choose_every_steps=3), layer)
    for step in range(STEPS):
        expected = fresh[:, :, step // 3 * 3].clone()
        expected[..., TOKENS - STEPS + step] = True
        assert torch.equal(old[:, :, step], expected)


def test_the_table_of_a_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A list of everything changes nothing; one of few tokens does; the second run reads what the first one kept."""
    rules = ['--rule=all={"budget_tokens": 4000}']
    rules.append('--rule=few={"budget_tokens": 6, "sink_tokens": 2, "recent_tokens": 2}')
    command = ["decode_losses", str(MODEL), "--tokens", "2000", "--prompts", "1", "--keep", str(tmp_path), *rules]
    tables = []
    for _ in range(2):
        monkeypatch.setattr(sys, "argv", command)
        main()
        tables.append(capsys.readouterr().out)
    assert tables[0] == tables[1]
    assert len(list(tmp_path.iterdir())) == 1
    rows = {row[1].strip(): [float(cell) for cell in row[3:-1]] for row in map(split, tables[0].splitlines()[4:])}
    assert rows["all"] == [1, 0, 1, 1, 1]
    same, divergence, read, kept, least = rows["few"]
    assert divergence > 0
    assert 0 < read < 0.02
    assert least <= kept < 1
    assert same <= 1


def split(line: str) -> list[str]:
    return line.split("|")
