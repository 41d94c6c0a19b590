"""Distributions of token counts, as a scenario writes them."""

from __future__ import annotations

import math
import random
from typing import Annotated

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from loadtest.load.settings import Strict


class Choice(Strict):
    """One of several counts: each as likely, or by `weights`."""

    choice: Annotated[tuple[PositiveInt, ...], Field(min_length=1)]
    weights: tuple[PositiveFloat, ...] | None = None

    @model_validator(mode="after")
    def _of_each(self) -> Choice:
        if self.weights is not None and len(self.weights) != len(self.choice):
            raise ValueError(f"weights: one for each of the {len(self.choice)} counts, not {len(self.weights)}")
        return self

    def draw(self, rng: random.Random) -> int:
        """A token count."""
        return rng.choice(self.choice) if self.weights is None else rng.choices(self.choice, self.weights)[0]


class Uniform(Strict):
    """Every count from the first to the last of `uniform`."""

    uniform: tuple[PositiveInt, PositiveInt]

    @model_validator(mode="after")
    def _ordered(self) -> Uniform:
        if self.uniform[0] > self.uniform[1]:
            raise ValueError(f"uniform: {list(self.uniform)}: the first number must not exceed the second")
        return self

    def draw(self, rng: random.Random) -> int:
        """A token count."""
        return rng.randint(*self.uniform)


class LogNormal(Strict):
    """Many short, few long: the logarithm is normal around that of `median` with deviation `sigma`, cut to a range."""

    median: PositiveInt
    sigma: Annotated[float, Field(gt=0)]
    least: PositiveInt = 1
    most: PositiveInt

    @model_validator(mode="after")
    def _ordered(self) -> LogNormal:
        if not self.least <= self.median <= self.most:
            raise ValueError(f"least <= median <= most does not hold: {self.least}, {self.median}, {self.most}")
        return self

    def draw(self, rng: random.Random) -> int:
        """A token count."""
        return min(self.most, max(self.least, round(math.exp(rng.gauss(math.log(self.median), self.sigma)))))


class Normal(Strict):
    """Around `mean` with `deviation`, cut to a range."""

    mean: PositiveInt
    deviation: PositiveFloat
    least: PositiveInt = 1
    most: PositiveInt

    @model_validator(mode="after")
    def _ordered(self) -> Normal:
        if not self.least <= self.mean <= self.most:
            raise ValueError(f"least <= mean <= most does not hold: {self.least}, {self.mean}, {self.most}")
        return self

    def draw(self, rng: random.Random) -> int:
        """A token count."""
        return min(self.most, max(self.least, round(rng.gauss(self.mean, self.deviation))))


Lengths = PositiveInt | Choice | Uniform | LogNormal | Normal


def draw(lengths: Lengths, rng: random.Random) -> int:
    """A token count of a distribution; a number is itself."""
    return lengths if isinstance(lengths, int) else lengths.draw(rng)
