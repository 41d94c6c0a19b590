"""Teach the bundled model RULER's tasks in longer contexts, on one GPU: `python -m loadtest.model.ruler --out FOLDER`.

The tasks are those of `loadtest/quality/tasks`, as a load test sends them, so that it gets real answers where no large
model is at hand. The model that comes of it is no better than that: it knows these tasks, and nothing else any more.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import os
import random
import re
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the usual name
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from loadtest.model.network import Architecture, Network, export, load_weights, rounded_copy
from loadtest.model.train import Log, learning_rate, right_tokens, stage_seconds
from loadtest.model.widen import BUNDLED
from loadtest.quality.tasks.ruler import TASKS
from loadtest.quality.tasks.task import Task
from loadtest.text.tokenizer import END, PAD, SPECIALS, build_tokenizer, chat_text, count_tokens, save_tokenizer

# Of the text around the answers: what the model knows of it already helps it to read.
FILLER_WEIGHT = 0.1
# Logits of so many tokens at once; of longer texts a part of the filler counts.
MOST_FILLER_TOKENS = 32768
PEAK_RATE, WARM_UP_STEPS = 1e-3, 100
REPORT_SECONDS = 10.0
# What a new seed is drawn from.
SEED_BITS = 48
# `niah_multi_key` takes longest to learn; so a share of the batches is of it alone, with further questions about the
# same text.
MULTI_KEY, MULTI_KEY_SHARE, MORE_QUESTIONS = "niah_multi_key", 0.25, 8
_UUIDS = re.compile(r"special uuids for (\S+) is: (\S+)\.")


@dataclass(frozen=True)
class Stage:
    """One stage of the curriculum.

    Attributes:
        tokens: of the longest samples; the shortest have half, which must be 512 or more for tasks to fit.
        batch_tokens: of a step.
        share: of the training time.
    """

    tokens: int
    batch_tokens: int
    share: float


STAGES = (
    Stage(1024, 65536, 0.3),
    Stage(4096, 65536, 0.2),
    Stage(16384, 65536, 0.15),
    Stage(65536, 65536, 0.15),
    Stage(131072, 131072, 0.2),
)


@dataclass(frozen=True)
class Sample:
    """A task with its answers, as tokens; the first answer begins at `answer_at`, and `answer` is where answers are."""

    task: str
    tokens: np.ndarray
    answer: np.ndarray

    @property
    def answer_at(self) -> int:
        return int(self.answer.argmax())


@dataclass(frozen=True)
class Batch:
    """Samples of about one length: tokens [B, L + 1] with padding behind them, and whether each is of an answer."""

    tasks: tuple[str, ...]
    tokens: Tensor
    answer: Tensor


def reference(name: str, task: Task) -> str:
    """The answer that is taught, after the task's own beginning of it."""
    if name in ("variable_tracking", "frequent_words"):
        return f" {' '.join(task.answers)}"
    # Several values are named in the text's order, in which they are found.
    found = sorted(task.answers, key=task.content.index)
    return f" {found[0] if len(found) == 1 else ', '.join(found[:-1]) + ' and ' + found[-1]}."


def more_questions(task: Task, rng: random.Random) -> Iterator[tuple[str, str]]:
    """Further questions about the text of `niah_multi_key`, up to where their answers begin, and these."""
    pairs = _UUIDS.findall(task.content)
    for key, value in rng.sample(pairs, min(MORE_QUESTIONS, len(pairs))):
        question = f"What is the special uuid for {key} mentioned in the text?"
        beginning = f"The special uuid for {key} mentioned in the text is"
        yield f"\n<|user|>\n{question}{END}\n<|assistant|>\n{beginning}", f" {value}."


def make_sample(name: str, seed: int, tokens: int, several: bool = True) -> Sample:
    """A task of about so many tokens, with `several` with further questions.

    Raises:
        ValueError: the task does not fit into them.
    """
    tokenizer = _tokenizer()
    task = TASKS[name](seed, tokens, functools.partial(count_tokens, tokenizer))
    parts = [(chat_text(task.content) + task.answer_prefix, reference(name, task))]
    if name == MULTI_KEY and several:
        parts += more_questions(task, random.Random(seed))
    ids: list[int] = []
    answer: list[bool] = []
    for question, reply in parts:
        for text, is_answer in ((question, False), (reply + END, True)):
            piece = tokenizer.encode(text, add_special_tokens=False).ids
            ids += piece
            answer += [is_answer] * len(piece)
    return Sample(name, np.array(ids, dtype=np.int32), np.array(answer))


@functools.cache
def _tokenizer() -> Tokenizer:
    return build_tokenizer()


def collate(samples: Sequence[Sample]) -> Batch:
    """Samples beside each other."""
    longest = max(len(sample.tokens) for sample in samples)
    tokens = torch.full((len(samples), longest), SPECIALS.index(PAD), dtype=torch.int32)
    answer = torch.zeros(len(samples), longest, dtype=torch.bool)
    for row, sample in enumerate(samples):
        tokens[row, : len(sample.tokens)] = torch.from_numpy(sample.tokens)
        answer[row, : len(sample.tokens)] = torch.from_numpy(sample.answer)
    return Batch(tuple(sample.task for sample in samples), tokens, answer)


class Samples(IterableDataset[Batch]):
    """Endless batches of a stage, different ones in each worker process."""

    def __init__(self, stage: Stage, seed: int) -> None:
        self._stage = stage
        self._seed = seed

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        rng = random.Random(f"{self._seed} {self._stage} {worker.id if worker else 0}")
        while True:
            # Short ones are as frequent as long ones, by tokens' orders of magnitude.
            tokens = round(self._stage.tokens * 2 ** -rng.random())
            names = [MULTI_KEY] if rng.random() < MULTI_KEY_SHARE else [name for name in TASKS if name != MULTI_KEY]
            samples: list[Sample] = []
            while not samples or (len(samples) + 1) * len(samples[0].tokens) <= self._stage.batch_tokens:
                try:
                    samples.append(make_sample(rng.choice(names), rng.getrandbits(SEED_BITS), tokens))
                except ValueError:
                    # Variable tracking does not fit into the shortest.
                    continue
            yield collate(samples)


def step_losses(network: Network, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Mean loss of the answers, mean loss of other tokens, and which samples are right in every token [B]."""
    inputs, targets = batch.tokens[:, :-1].long(), batch.tokens[:, 1:].long()
    answer, padding = batch.answer[:, 1:], targets == SPECIALS.index(PAD)
    filler = ~answer & ~padding
    filler &= torch.rand(filler.shape, device=filler.device) < MOST_FILLER_TOKENS / targets.numel()
    counted = answer | filler
    logits = network.head(network.hidden(inputs)[counted]).float()
    each = F.cross_entropy(logits, targets[counted], reduction="none")
    is_answer = answer[counted]
    wrong = torch.zeros_like(answer)
    wrong[counted] = is_answer & (logits.argmax(-1) != targets[counted])
    return each[is_answer].mean(), each[~is_answer].mean(), ~wrong.any(1)


def train(network: Network, stages: Sequence[Stage], seconds: float, seed: int, workers: int, log: Log) -> None:
    """Train by all stages, each for its share of the time."""
    device = network.get_buffer("cosine").device
    optimizer = torch.optim.AdamW(network.parameters(), lr=PEAK_RATE, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    began = time.monotonic()
    steps = 0
    for number, stage in enumerate(stages):
        elapsed = time.monotonic() - began
        end = elapsed + stage_seconds([later.share for later in stages[number:]], seconds - elapsed)
        log(f"{stage}, until {end:.0f} s")
        loader = DataLoader(Samples(stage, seed), batch_size=None, num_workers=workers, prefetch_factor=4)
        right: dict[str, list[Tensor]] = defaultdict(list)
        reported = time.monotonic()
        for batch in loader:
            elapsed = time.monotonic() - began
            if elapsed >= end:
                break
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(PEAK_RATE, WARM_UP_STEPS, steps, elapsed / seconds)
            on_device = Batch(batch.tasks, batch.tokens.to(device), batch.answer.to(device))
            answers, filler, hits = step_losses(network, on_device)
            optimizer.zero_grad()
            (answers + FILLER_WEIGHT * filler).backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            steps += 1
            for row, name in enumerate(batch.tasks):
                right[name].append(hits[row])
            if time.monotonic() - reported >= REPORT_SECONDS:
                shares = ", ".join(
                    f"{name} {float(torch.stack(found).float().mean()):.2f}" for name, found in sorted(right.items())
                )
                log(f"step {steps} answers {float(answers.detach()):.3f} filler {float(filler.detach()):.3f}: {shares}")
                right.clear()
                reported = time.monotonic()


def exam(network: Network, lengths: Sequence[int], count: int, seed: int, workers: int, log: Log) -> None:
    """Share of fresh tasks whose answers are right in every token, each after the right ones before it."""
    network = rounded_copy(network)
    rng = random.Random(f"exam {seed}")
    asked = [
        (name, rng.getrandbits(SEED_BITS), tokens, False) for tokens in lengths for name in TASKS for _ in range(count)
    ]
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        samples = pool.starmap(make_sample, asked, chunksize=1)
    right: dict[tuple[int, str], int] = defaultdict(int)
    for (name, _, tokens, _), sample in zip(asked, samples, strict=True):
        right[tokens, name] += bool(right_tokens(network, sample.tokens, sample.answer_at).all())
    for tokens in lengths:
        log(f"test {tokens} tokens, of {count}: " + ", ".join(f"{name} {right[tokens, name]}" for name in TASKS))


def main() -> None:
    """Command line of the training."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--seconds", type=float, default=400.0, help="training time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", type=Path, default=BUNDLED, help="folder of the model to start from")
    parser.add_argument("--longest", type=int, default=139264, help="longest context in tokens")
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(arguments.seed)
    tokenizer = _tokenizer()
    sizes = Architecture(tokenizer.get_vocab_size(), longest=arguments.longest)
    network = Network(sizes, torch.bfloat16).to(arguments.device)
    load_weights(network, arguments.resume)
    save_tokenizer(tokenizer, arguments.out, sizes.longest)
    workers = max(1, (os.cpu_count() or 2) - 1)
    stages = [stage for stage in STAGES if stage.tokens <= sizes.longest]
    with (arguments.out / "train.log").open("w", encoding="utf-8") as file:
        log = Log(file)
        log(f"torch {torch.__version__}, {arguments}")
        train(network, stages, arguments.seconds, arguments.seed, workers, log)
        export(network, arguments.out)
        exam(network, [stage.tokens for stage in stages[1:]], 20, arguments.seed, workers, log)


if __name__ == "__main__":
    main()
