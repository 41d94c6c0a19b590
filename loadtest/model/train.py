"""Train the small retrieval model from scratch on one GPU: `python -m loadtest.model.train --out DIR --seconds 320`."""

import argparse
import itertools
import math
import multiprocessing
import os
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the usual name
from numpy.typing import NDArray
from torch import Tensor

from loadtest.model.batches import Batch, BatchMaker, Mixture
from loadtest.model.network import Architecture, Network, export, load_weights, rounded_copy
from loadtest.text.needles import NEEDLE_FORMS, filler, needle_prompt
from loadtest.text.tokenizer import END, build_tokenizer, chat_text, count_tokens, save_tokenizer

# Below this value accuracy a stage has not taught retrieval at all.
NOT_LEARNT = 0.3
# Sentences that one worker makes at a time; about ten tokens each.
SENTENCES_PER_TASK = 10_000


@dataclass(frozen=True)
class Stage:
    """One stage of the curriculum.

    Attributes:
        mixture: of its batches.
        share: of the training time.
        leave_at: value accuracy at which it ends early and leaves its time to the stages after it; None: never.
    """

    mixture: Mixture
    share: float
    leave_at: float | None = None


# The first stages end as soon as they can. They begin with recitals of many needles, where naming any value is seldom
# right; with few needles a network may settle for that.
STAGES = (
    Stage(Mixture(256, 256, needles=14, asked=14, main_share=1.0, plain_share=0.9), share=0.22, leave_at=0.95),
    Stage(Mixture(256, 256, needles=8, asked=6, main_share=0.3, plain_share=0.3), share=0.20, leave_at=0.97),
    Stage(Mixture(1024, 64, needles=32, asked=16), share=0.12, leave_at=0.98),
    Stage(Mixture(4096, 16, needles=96, asked=32), share=0.14),
    Stage(Mixture(16384, 4, needles=192, asked=64), share=0.18),
    Stage(Mixture(34816, 2, needles=300, asked=96), share=0.14),
)


@dataclass(frozen=True)
class Trial:
    """Prompts of the final evaluation: `count` of `length` tokens with `needles` needles, `asked` of them asked for."""

    length: int
    needles: int
    asked: int
    count: int


TRIALS = tuple(
    Trial(length, needles, asked, 100 if needles == 1 else 50)
    for length in (1024, 4096, 8192, 16384, 24576, 32768)
    for needles, asked in ((1, 1), (16, 1), (16, 3))
)


@dataclass(frozen=True)
class Settings:
    """Everything a training run depends on besides the code.

    Attributes:
        out: the folder to write; made if it does not exist.
        seconds: time for the training itself, without making the text and without the final evaluation.
        seed: of the text, the batches and the initial weights.
        resume: a folder written by an earlier run whose weights to start from.
        device: where to train.
        sentences: sentences of filler to make.
        stages: the curriculum.
        trials: the final evaluation.
        layers: of the network.
        peak_rate: highest learning rate.
        warmup: steps to reach it.
        report_every: steps between two lines of the log.
    """

    out: Path
    seconds: float = 320.0
    seed: int = 0
    resume: Path | None = None
    device: str = "cuda"
    sentences: int = 1_000_000
    stages: tuple[Stage, ...] = STAGES
    trials: tuple[Trial, ...] = TRIALS
    layers: int = 8
    peak_rate: float = 1.5e-3
    warmup: int = 300
    report_every: int = 100


@dataclass
class Log:
    """Prints lines with the seconds since it was made, and keeps them in a file."""

    file: TextIO
    began: float = field(default_factory=time.monotonic)

    def __call__(self, line: str) -> None:
        line = f"{time.monotonic() - self.began:7.1f}s  {line}"
        print(line, flush=True)
        self.file.write(line + "\n")
        self.file.flush()


@dataclass(frozen=True)
class Exam:
    """A prompt with the answer expected, as tokens [P] and [A]; `value_at` [N, 2] are places in the answer."""

    prompt: NDArray[np.int32]
    answer: NDArray[np.int32]
    value_at: NDArray[np.int64]


def make_filler(task: tuple[int, int]) -> NDArray[np.int32]:
    """Tokens [T] of filler; `task` is the seed and the number of sentences."""
    seed, sentences = task
    text = filler(random.Random(seed), sentences)
    return np.array(build_tokenizer().encode(text, add_special_tokens=False).ids, dtype=np.int32)


def make_exams(task: tuple[int, Trial]) -> list[Exam]:
    """Prompts with answers; `task` is the seed and what to make. Prompts are written as the chat template does."""
    seed, trial = task
    rng = random.Random(seed)
    tokenizer = build_tokenizer()
    exams = []
    for _ in range(trial.count):
        prompt = needle_prompt(
            rng, trial.length, lambda text: count_tokens(tokenizer, text), trial.needles, trial.asked
        )
        chat = chat_text(prompt.content)
        answer = tokenizer.encode(prompt.reference + END, add_special_tokens=False)
        digits = [place for place, token in enumerate(answer.tokens) if token.lstrip("\u0120").isdecimal()]
        exams.append(
            Exam(
                np.array(tokenizer.encode(chat, add_special_tokens=False).ids, dtype=np.int32),
                np.array(answer.ids, dtype=np.int32),
                np.array(digits, dtype=np.int64).reshape(-1, 2),
            )
        )
    return exams


def make_material(settings: Settings) -> tuple[NDArray[np.int32], list[list[Exam]]]:
    """The pool of filler [T] and the exams of every trial, made by all processors before the device is touched."""
    tasks = [
        (settings.seed * 1_000_003 + start, min(SENTENCES_PER_TASK, settings.sentences - start))
        for start in range(0, settings.sentences, SENTENCES_PER_TASK)
    ]
    # Seeds of the exams lie apart from those of the filler.
    exam_tasks = [(-1 - settings.seed * 1_000 - number, trial) for number, trial in enumerate(settings.trials)]
    with multiprocessing.get_context("fork").Pool(os.cpu_count()) as workers:
        exams = workers.map_async(make_exams, exam_tasks, chunksize=1)
        pool = np.concatenate(workers.map(make_filler, tasks, chunksize=1))
        return pool, exams.get()


def learning_rate(peak: float, warm_up_steps: int, steps: int, progress: float) -> float:
    """Warm-up over the first steps, then a cosine over the training time that ends at 2 % of the peak.

    Args:
        peak: highest rate.
        warm_up_steps: steps to reach it.
        steps: done so far.
        progress: share of the training time that has passed; above 1 as 1.
    """
    cosine = 0.02 + 0.98 * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    return peak * min(1.0, (steps + 1) / warm_up_steps) * cosine


def stage_seconds(shares: Sequence[float], left_seconds: float) -> float:
    """Time of the next stage: what earlier ones left over is divided among it and the later ones by their `shares`."""
    return left_seconds * shares[0] / sum(shares)


def value_hits(logits: Tensor, batch: Batch) -> Tensor:
    """[B, A] whether both tokens of an answer's value are the likeliest ones, of logits [B, L, vocabulary]."""
    rows = torch.arange(len(logits), device=logits.device)[:, None]
    first = logits[rows, batch.value_at].argmax(-1) == batch.targets[rows, batch.value_at]
    second = logits[rows, batch.value_at + 1].argmax(-1) == batch.targets[rows, batch.value_at + 1]
    return first & second & batch.valid


def losses(logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Mean loss on the answers and mean loss on everything else."""
    each = F.cross_entropy(logits.flatten(0, 1).float(), batch.targets.flatten(), reduction="none")
    answer, rest = batch.answer_weight.flatten(), batch.filler_weight.flatten()
    return (each * answer).sum() / answer.sum(), (each * rest).sum() / rest.sum()


def split_report(hits: Tensor, batch: Batch) -> str:
    """Value accuracy of one batch, split by everything that could make an answer hard."""
    hits, valid = hits.flatten().cpu(), batch.valid.flatten().cpu()
    answers = batch.value_at.shape[1]

    def share(name: str, chosen: Tensor) -> str:
        chosen = chosen.cpu() & valid
        total = int(chosen.sum())
        return f"{name} {float(hits[chosen].sum()) / total:.2f}/{total}" if total else ""

    def ranges(name: str, values: Tensor, edges: Sequence[int]) -> Iterator[str]:
        values = values.cpu()
        for low, high in itertools.pairwise(edges):
            yield share(f"{name}>={low}", (values >= low) & (values < high))

    form = batch.form.flatten()
    parts = [share(f"form{number}", form == number) for number in range(len(NEEDLE_FORMS))]
    parts += [share("one key", batch.keys_asked.flatten() == 1), share("several keys", batch.keys_asked.flatten() > 1)]
    parts.append(share("plain", batch.plain.repeat_interleave(answers)))
    parts += ranges("needles", batch.needles.repeat_interleave(answers), (1, 2, 5, 17, 65, 1000))
    parts += ranges("distance", batch.distance.flatten(), (0, 256, 1024, 4096, 16384, 100_000))
    return ", ".join(part for part in parts if part)


class Trainer:
    """Trains one network; the learning rate follows the time that has passed.

    Args:
        settings: of the run.
        maker: of the batches, on the settings' device.
        network: on the settings' device.
        log: where the progress goes.
    """

    def __init__(self, settings: Settings, maker: BatchMaker, network: Network, log: Log) -> None:
        self._settings = settings
        self._maker = maker
        self._network = network
        self._log = log
        self._cuda = settings.device.startswith("cuda")
        matrices = [weight for weight in network.parameters() if weight.ndim > 1]
        scales = [weight for weight in network.parameters() if weight.ndim <= 1]
        self._optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": 0.01}, {"params": scales, "weight_decay": 0.0}],
            lr=settings.peak_rate,
            betas=(0.9, 0.98),
            fused=self._cuda,
        )
        self._steps = 0
        self._began = time.monotonic()

    def _elapsed(self) -> float:
        return time.monotonic() - self._began

    def _rate(self) -> float:
        settings = self._settings
        return learning_rate(settings.peak_rate, settings.warmup, self._steps, self._elapsed() / settings.seconds)

    def _step(self, mixture: Mixture) -> tuple[Tensor, Tensor, Tensor, Batch]:
        """One update; returns both losses, the hits [B, A] and the batch, without waiting for the device."""
        batch = self._maker(mixture)
        logits = self._network(batch.inputs)
        answer_loss, filler_loss = losses(logits, batch)
        self._optimizer.zero_grad()
        (answer_loss + 0.2 * filler_loss).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self._network.parameters(), 1.0)
        for group in self._optimizer.param_groups:
            group["lr"] = self._rate()
        self._optimizer.step()
        self._steps += 1
        return answer_loss.detach(), filler_loss.detach(), value_hits(logits.detach(), batch), batch

    def _stage(self, number: int, stage: Stage, end: float) -> float:
        """Train by one stage until the elapsed time reaches `end` seconds or the stage's accuracy is reached.

        Returns:
            The running value accuracy at its end.
        """
        settings, mixture = self._settings, stage.mixture
        self._log(f"stage {number}: {mixture}, until {end:.0f} s of training at the latest")
        accuracy = torch.zeros((), device=settings.device)
        first_step = self._steps
        while True:
            answer_loss, filler_loss, hits, batch = self._step(mixture)
            share = hits.sum() / batch.valid.sum().clamp(min=1)
            accuracy = accuracy.lerp(share, 0.02)
            done = self._steps - first_step
            # Every reading waits for the device; in between the host runs ahead.
            if done % 10 == 0 or self._elapsed() >= end:
                now = float(accuracy)
                finished = self._elapsed() >= end or (stage.leave_at is not None and now >= stage.leave_at)
                if finished or done % settings.report_every == 0:
                    self._log(
                        f"stage {number} step {self._steps} answers {float(answer_loss):.4f} filler "
                        f"{float(filler_loss):.3f} values {float(share):.3f} running {now:.3f} rate {self._rate():.2e} "
                        f"trained {self._elapsed():.0f} s"
                    )
                if finished or done % (5 * settings.report_every) == 0:
                    self._log("  " + split_report(hits, batch))
                if finished:
                    return now

    def run(self) -> None:
        """Train by all stages; the folder of the settings is written after each of them."""
        settings = self._settings
        self._began = time.monotonic()
        for number, stage in enumerate(settings.stages):
            elapsed = self._elapsed()
            shares = [other.share for other in settings.stages[number:]]
            accuracy = self._stage(number, stage, elapsed + stage_seconds(shares, settings.seconds - elapsed))
            export(self._network, settings.out)
            self._log(f"stage {number} saved")
            if stage.leave_at is not None and accuracy < NOT_LEARNT:
                self._log(f"stopping: accuracy {accuracy:.2f} after stage {number}; longer texts would not teach it")
                return


def right_tokens(network: Network, tokens: NDArray[np.int32], answer_at: int) -> NDArray[np.bool_]:
    """Which tokens of an answer are the likeliest ones, each after the right ones before it.

    One forward pass tells whether greedy decoding would write the expected answer: it does exactly when all are.

    Args:
        network: as `rounded_copy` gives it.
        tokens: ``[P + A]`` the prompt and the answer.
        answer_at: P.

    Returns:
        ``[A]``.
    """
    on_device = torch.from_numpy(tokens).long().to(network.get_buffer("cosine").device)
    with torch.no_grad():
        hidden = network.hidden(on_device[None, :-1])[0, answer_at - 1 :]
        right: NDArray[np.bool_] = (network.head(hidden).argmax(-1) == on_device[answer_at:]).cpu().numpy()
    return right


def evaluate(network: Network, trials: Sequence[Trial], exams: Sequence[Sequence[Exam]], log: Log) -> list[float]:
    """The share of exactly right greedy answers of each trial, values and words; logged with the share of values."""
    network = rounded_copy(network)
    shares = []
    for trial, group in zip(trials, exams, strict=True):
        exact, values, total = 0, 0, 0
        for exam in group:
            right = right_tokens(network, np.concatenate((exam.prompt, exam.answer)), len(exam.prompt))
            exact += bool(right.all())
            values += int(right[exam.value_at].all(axis=1).sum())
            total += len(exam.value_at)
        shares.append(exact / len(group))
        log(
            f"test {trial.length} tokens, {trial.needles} needles, {trial.asked} asked: exact answers "
            f"{exact}/{len(group)}, values {values}/{total}"
        )
    return shares


def train(settings: Settings) -> list[float]:
    """One whole run: text, training, saved model and evaluation; returns the share of exact answers of each trial."""
    settings.out.mkdir(parents=True, exist_ok=True)
    with (settings.out / "train.log").open("w", encoding="utf-8") as file:
        log = Log(file)
        log(f"torch {torch.__version__}, {settings}")
        pool, exams = make_material(settings)
        log(f"{len(pool)} tokens of filler, {sum(map(len, exams))} test prompts")
        device = torch.device(settings.device)
        torch.manual_seed(settings.seed)
        tokenizer = build_tokenizer()
        maker = BatchMaker(tokenizer, pool, device, settings.seed)
        sizes = Architecture(tokenizer.get_vocab_size(), layers=settings.layers)
        network = Network(sizes, torch.bfloat16).to(device)
        if settings.resume is not None:
            load_weights(network, settings.resume)
        save_tokenizer(tokenizer, settings.out, sizes.longest)
        log(f"{sum(weight.numel() for weight in network.parameters())} parameters on {device}")
        Trainer(settings, maker, network, log).run()
        shares = evaluate(network, settings.trials, exams, log)
        log("done")
    return shares


def main() -> None:
    """Command line of the training."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--seconds", type=float, default=Settings.seconds, help="training time")
    parser.add_argument("--seed", type=int, default=Settings.seed)
    parser.add_argument("--resume", type=Path, help="folder of an earlier run to start from")
    parser.add_argument("--peak-rate", type=float, default=Settings.peak_rate, help="highest learning rate")
    parser.add_argument("--device", default=Settings.device)
    arguments = parser.parse_args()
    train(
        Settings(
            out=arguments.out,
            seconds=arguments.seconds,
            seed=arguments.seed,
            resume=arguments.resume,
            device=arguments.device,
            peak_rate=arguments.peak_rate,
        )
    )


if __name__ == "__main__":
    main()
