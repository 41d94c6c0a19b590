"""The journal of a run: a line of JSON for everything that happens, written as it happens.

Whatever ends a run, the journal holds what was measured until then, and the report is made from it alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from loadtest.load.reply import Reply

FORMAT = 2
# What the journal of a run that did not come to its end lacks.
KILLED = {"interrupted": True, "warm_up_failed": False, "seconds": None}
NAME = "journal.jsonl"


@dataclass(frozen=True)
class Record:
    """A request that was sent.

    Attributes:
        stage: name of the stage.
        session: its number in the stage's schedule.
        turn: of the session.
        workload, method, pair: as scheduled.
        intended_seconds: when it was to be sent; in a closed loop, when it was.
        ramp: sent while the load grew, so that it does not count.
        planned_input_tokens: of the session's first turn.
        adapter: LoRA adapter that was asked; none: the model itself.
        score: share of the answer that is right (0..1); none where nothing is known to be right, or it failed.
        reply: what came.
    """

    stage: str
    session: int
    turn: int
    workload: str
    method: str
    pair: str
    intended_seconds: float
    ramp: bool
    planned_input_tokens: int
    adapter: str | None
    score: float | None
    reply: Reply


class Journal:
    """Writes the journal of one run.

    Args:
        folder: of the run.

    Raises:
        FileExistsError: the folder holds a journal already.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME
        # Line by line, so that a killed run loses nothing but the line being written.
        self._file = self.path.open("x", encoding="utf-8", buffering=1)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def write(self, kind: str, content: Mapping[str, Any]) -> None:
        """Add a line."""
        self._file.write(json.dumps({"kind": kind, **content}) + "\n")

    def record(self, record: Record) -> dict[str, Any]:
        """Add a request, and return it as the journal has it."""
        content = asdict(record)
        reply = content.pop("reply")
        for name, value in reply.items():
            content[name] = round(value, 6) if name.endswith("_seconds") and value is not None else value
        content["intended_seconds"] = round(content["intended_seconds"], 6)
        self.write("request", content)
        return content


def read_journal(path: Path) -> dict[str, Any]:
    """A run from its journal.

    Returns:
        ``run``, ``stages`` (``schedule``, ``requests``, ``client``), ``refused`` (stages that were not run),
        ``metrics``, ``end``.

    A last line that was cut short is left out, and so is what a killed run did not come to write.

    Raises:
        ValueError: that is no journal, or of another format.
    """
    run: dict[str, Any] = {"run": {}, "stages": [], "refused": [], "metrics": [], "end": KILLED}
    for line in _lines(path):
        kind = line.pop("kind")
        if kind == "run":
            run["run"] = line
        elif kind == "stage":
            run["stages"].append({**line, "requests": [], "client": None, "stopped": None})
        elif kind == "request":
            run["stages"][-1]["requests"].append(line)
        elif kind == "stopped":
            run["stages"][-1]["stopped"] = line["reason"]
        elif kind == "client":
            run["stages"][-1]["client"] = line
        elif kind == "refused":
            run["refused"].append(line)
        elif kind == "metrics":
            run["metrics"].append(line)
        elif kind == "end":
            run["end"] = line
    if run["run"].get("format") != FORMAT:
        raise ValueError(f"{path} is no journal of format {FORMAT}")
    return run


def _lines(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    parsed = []
    for number, line in enumerate(lines):
        try:
            parsed.append(json.loads(line))
        except ValueError:
            if number + 1 < len(lines):
                raise ValueError(f"{path}, line {number + 1}, is no JSON") from None
    return parsed
