"""A scenario: which methods, which prompts, which load, which limits. Read from a YAML file, checked before it runs."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    Field,
    JsonValue,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from loadtest.load.settings import NotNegative, ScenarioError, Strict
from loadtest.load.thresholds import ThresholdText, parse_threshold
from loadtest.load.workloads.files import DataFile, read_text
from loadtest.load.workloads.kinds import Workload
from loadtest.load.workloads.prompt import Endpoint

BUNDLED = Path(__file__).parent / "scenarios"

Share = Annotated[float, Field(gt=0, le=1)]


def _rising(levels: tuple[float, ...]) -> tuple[float, ...]:
    if any(after <= before for before, after in itertools.pairwise(levels)):
        raise ValueError(f"levels of load must rise: {list(levels)}")
    return levels


Rates = Annotated[tuple[PositiveFloat, ...], Field(min_length=1), AfterValidator(_rising)]
Concurrencies = Annotated[tuple[PositiveInt, ...], Field(min_length=1), AfterValidator(_rising)]


class _Load(Strict):
    """What both loops have.

    Attributes:
        methods_apart: run the whole sweep for each method alone, with the same prompts and arrivals, so that the
            server holds nothing but that method; otherwise all methods mix in every stage.
        ramp_seconds: the load grows during so long; what starts meanwhile counts as warm-up.
    """

    methods_apart: bool = False
    ramp_seconds: NotNegative = 0.0


class SearchSettings(Strict):
    """The search for the highest rate that holds the SLO (`loadtest.load.search`).

    Attributes:
        first_share: of what the server sustained in the warm-up: the rate to begin with.
        factor: from one rate to the next, until one breaks the SLO.
        refinements: rates tried between the last that held and the first that broke.
        stage_seconds: so long a rate lasts at least: in less, no queue grows that would show that it is too high.
        most_stages: rates in all.
    """

    first_share: PositiveFloat = 0.5
    factor: Annotated[float, Field(gt=1)] = 1.6
    refinements: NonNegativeInt = 2
    stage_seconds: PositiveFloat = 30.0
    most_stages: PositiveInt = 12


class OpenLoad(_Load):
    """Requests arrive whether or not earlier ones have ended; latency counts from the intended time.

    Attributes:
        rates: session arrivals a second; a stage each, in order, until the SLO breaks.
        capacity_shares: in place of rates, shares of the rate that the server sustained in the warm-up, so that a
            scenario suits servers of any speed.
        search: in place of rates, look for the highest one that holds the SLO; with `methods_apart`, of each method.
        burstiness: shape of the gamma intervals; 1 is Poisson, less is more bursty.
        trace: file of a trace (`loadtest.load.workloads.traces`), replayed at its own pace.
        trace_speed: so many times faster.
        requests, duration_seconds: how much a stage sends: exactly one of the two; with `capacity_shares` both, and
            the first one that is reached ends the stage.
    """

    loop: Literal["open"]
    arrivals: Literal["poisson", "gamma", "constant", "trace"] = "poisson"
    burstiness: PositiveFloat | None = None
    rates: Rates | None = None
    capacity_shares: Rates | None = None
    search: SearchSettings | None = None
    trace: DataFile | None = None
    trace_speed: PositiveFloat = 1.0
    requests: PositiveInt | None = None
    duration_seconds: PositiveFloat | None = None

    @model_validator(mode="after")
    def _consistent(self) -> OpenLoad:
        if (self.burstiness is None) == (self.arrivals == "gamma"):
            raise ValueError("burstiness belongs to arrivals: gamma, and only to it")
        if (self.trace is None) == (self.arrivals == "trace"):
            raise ValueError("trace names the file of arrivals: trace, and only of it")
        given = [self.rates, self.capacity_shares, self.search]
        if sum(one is not None for one in given) + (self.arrivals == "trace") != 1:
            raise ValueError(
                "give exactly one of rates, capacity_shares, search and arrivals: trace, which has its own pace"
            )
        if self.arrivals == "trace":
            if self.duration_seconds is not None or self.ramp_seconds:
                raise ValueError("arrivals: trace takes neither duration_seconds nor ramp_seconds")
        elif self.capacity_shares is not None:
            if self.requests is None or self.duration_seconds is None:
                raise ValueError("capacity_shares need both requests and duration_seconds, the most of each")
            if self.ramp_seconds:
                raise ValueError("capacity_shares take no ramp_seconds")
        elif self.search is not None:
            if self.requests is None or self.duration_seconds is not None:
                raise ValueError(
                    "search needs requests, the least of a rate, and has stage_seconds in place of duration_seconds"
                )
        elif (self.requests is None) == (self.duration_seconds is None):
            raise ValueError("give exactly one of requests and duration_seconds")
        return self


class ClosedLoad(_Load):
    """So many sessions at once; the next one starts when one ends. Latency counts from the send.

    Attributes:
        concurrency: sessions at once; a stage each, in order, until the SLO breaks.
        requests: sessions of a stage, at most.
        duration_seconds: none starts later than that.
    """

    loop: Literal["closed"]
    concurrency: Concurrencies
    requests: PositiveInt
    duration_seconds: PositiveFloat | None = None


class Slo(Strict):
    """A request is good when it succeeds within every limit; a stage holds while `share` of its requests are good.

    The limit on TTFT is `ttft_seconds + ttft_seconds_per_1000_tokens * input tokens / 1000`, so that long requests do
    not fail by design. `gap_p99_seconds` limits the 99th percentile of a request's gaps between tokens, and
    `latency_seconds` the time until its last token; none: no limit. `requests_per_second` is the rate that is wanted:
    a run has failed if no stage with so many requests a second holds (with `methods_apart`, of each method). It is no
    limit of a stage, since loads rise from below it.
    """

    ttft_seconds: PositiveFloat
    ttft_seconds_per_1000_tokens: NotNegative = 0.0
    tpot_seconds: PositiveFloat
    gap_p99_seconds: PositiveFloat | None = None
    latency_seconds: PositiveFloat | None = None
    requests_per_second: PositiveFloat | None = None
    share: Share = 0.9

    def ttft_limit_seconds(self, input_tokens: int) -> float:
        """The limit for a prompt of that length."""
        return self.ttft_seconds + self.ttft_seconds_per_1000_tokens * input_tokens / 1000


class Stop(Strict):
    """When a stage is not worth going on with; what runs then is broken off, and the run has failed.

    Attributes:
        failed_share: of the requests that have ended, once there are `after_requests`.
        in_flight: requests at once, above which only a queue grows; none: no limit.
    """

    failed_share: Share = 0.5
    after_requests: PositiveInt = 20
    in_flight: PositiveInt | None = None


class Scenario(Strict):
    """A load test.

    Attributes:
        methods: name to the `vllm_xargs` of its requests; the first one is what the others are compared with.
        endpoint: `chat` or `completions`.
        request: further fields of every request's body, such as `chat_template_kwargs`.
        warm_up_rounds: before the stages, that often: one request for each method, workload and doubling of the length;
            after them, where requests arrive at a rate, some at once, which tells what the server sustains. Rates that
            are hopeless by that are not run.
        request_timeout_seconds: after that a request has failed. Nothing is ever retried.
        stop: when a stage is broken off; none: never.
        fail_on: conditions under which the run has failed and ends with exit status 1 (`loadtest.load.thresholds`).
        scrape_seconds: between two readings of the server's metrics.
    """

    description: str
    seed: int = 0
    endpoint: Endpoint = "chat"
    methods: Annotated[Mapping[str, Mapping[str, JsonValue]], Field(min_length=1)]
    workloads: Annotated[tuple[Workload, ...], Field(min_length=1)]
    load: Annotated[OpenLoad | ClosedLoad, Field(discriminator="loop")]
    slo: Slo
    request: Mapping[str, JsonValue] = {}
    warm_up_rounds: Annotated[int, Field(ge=0)] = 1
    request_timeout_seconds: PositiveFloat = 600.0
    stop: Stop | None = None
    fail_on: tuple[ThresholdText, ...] = ("failures > 0",)
    scrape_seconds: PositiveFloat = 2.0

    @model_validator(mode="after")
    def _methods_exist(self) -> Scenario:
        names = [workload.name for workload in self.workloads]
        if len(set(names)) < len(names):
            raise ValueError(f"workloads: names must differ, these are given: {names}")
        by_capacity = isinstance(self.load, OpenLoad) and (self.load.capacity_shares or self.load.search)
        if by_capacity and not self.warm_up_rounds:
            raise ValueError("capacity_shares and search need warm_up_rounds of at least 1, which measure the capacity")
        for text in self.fail_on:
            method = parse_threshold(text).method
            if method is not None and method not in self.methods:
                raise ValueError(f"fail_on: {text!r}: no method {method!r}; there are {[*self.methods]}")
        for workload in self.workloads:
            unknown = sorted(set(workload.methods or ()) - set(self.methods))
            if unknown:
                raise ValueError(f"workload {workload.name!r}: no such methods: {unknown}; there are {[*self.methods]}")
            if workload.kind in ("documents", "sharegpt", "agents") and self.endpoint == "completions":
                raise ValueError(f"workload {workload.name!r}: conversations need endpoint: chat")
        return self

    @property
    def baseline(self) -> str:
        """The method that the others are compared with."""
        return next(iter(self.methods))


def scenario_names() -> list[str]:
    """The scenarios that come with the load test."""
    return sorted(path.stem for path in BUNDLED.glob("*.yaml"))


def load_scenario(name: str, settings: Sequence[str] = ()) -> Scenario:
    """A bundled scenario by name, or of a file, with some settings replaced.

    Args:
        name: such as ``smoke``, or a path that ends in ``.yaml``.
        settings: ``PATH=VALUE``, the path dotted and the value YAML, such as ``load.rates=[1, 2]``.

    Raises:
        ScenarioError: there is none, or it is not valid.
    """
    path = Path(name) if name.endswith((".yaml", ".yml", ".json")) else BUNDLED / f"{name}.yaml"
    if not path.exists():
        raise ScenarioError(
            f"no scenario {name!r}: give the path of a .yaml file or one of {', '.join(scenario_names())}"
        )
    text = read_text(path)
    try:
        content = yaml.safe_load(text)
        lines = _lines_of(yaml.compose(text, yaml.SafeLoader))
    except (yaml.YAMLError, ValueError) as error:
        raise ScenarioError(f"{path} is not YAML: {error}") from None
    if not isinstance(content, dict):
        raise ScenarioError(f"{path} holds no mapping of settings")
    for setting in settings:
        _replace(content, setting)
    try:
        return Scenario.model_validate(content)
    except ValidationError as error:
        reasons = [f"  {_where(part['loc'], part['msg'], lines, settings)}" for part in error.errors()]
        raise ScenarioError(f"{path} is not a valid scenario:\n" + "\n".join(reasons)) from None


def _lines_of(node: yaml.Node | None, place: tuple[str | int, ...] = ()) -> dict[tuple[str | int, ...], int]:
    """The line of each setting, by its place.

    Raises:
        ValueError: a mapping has a key twice, of which YAML would keep the last.
    """
    if node is None:
        return {}
    found = {place: node.start_mark.line + 1}
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if (*place, key.value) in found:
                raise ValueError(f"line {key.start_mark.line + 1}: {key.value!r} stands there twice")
            found |= _lines_of(value, (*place, key.value))
    elif isinstance(node, yaml.SequenceNode):
        for number, value in enumerate(node.value):
            found |= _lines_of(value, (*place, number))
    return found


def _where(
    location: tuple[int | str, ...],
    reason: str,
    lines: Mapping[tuple[str | int, ...], int],
    settings: Sequence[str],
) -> str:
    """What is wrong with a setting, with the line of the file unless `settings` replaced it."""
    name = ".".join(map(str, location)) or "scenario"
    known: tuple[int | str, ...] = ()
    for part in location:
        # Parts that are not in the file name the kind of a load or workload.
        known = (*known, part) if (*known, part) in lines else known
    dotted = ".".join(map(str, known))
    replaced = [setting.partition("=")[0] for setting in settings]
    from_file = known and not any(f"{dotted}.".startswith(f"{place}.") for place in replaced)
    return f"{name}: {reason} (line {lines[known]})" if from_file else f"{name}: {reason}"


def _replace(content: dict[str, Any], setting: str) -> None:
    place, equals, text = setting.partition("=")
    if not equals:
        raise ScenarioError(f"--set {setting}: PATH=VALUE is wanted, such as load.rates=[1, 2]")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ScenarioError(f"--set {setting}: the value is not YAML: {error}") from None
    *parents, last = place.split(".")
    target: Any = content
    for number, key in enumerate(parents, 1):
        target = target[_index(target, key, setting)] if isinstance(target, list) else target.setdefault(key, {})
        if not isinstance(target, dict | list):
            raise ScenarioError(f"--set {setting}: {'.'.join(parents[:number])!r} holds no settings of its own")
    target[_index(target, last, setting) if isinstance(target, list) else last] = value


def _index(target: Sequence[Any], key: str, setting: str) -> int:
    if not key.isdigit() or int(key) >= len(target):
        raise ScenarioError(f"--set {setting}: {key!r} is no place of that list, which has 0 to {len(target) - 1}")
    return int(key)
