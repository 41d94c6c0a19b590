"""What a user sees of a run while it goes on."""

from __future__ import annotations

import asyncio
import sys
from collections import deque
from collections.abc import Callable
from typing import TextIO

LINE_SECONDS = 10.0
LIVE_SECONDS = 0.5
# Over which the rate is taken.
WINDOW_SECONDS = 10.0
BAR_CHARACTERS = 20


class Progress:
    """Lines for the user: one that renews itself on a terminal, one every ten seconds elsewhere.

    Args:
        clock: seconds.
        out: where it goes.
    """

    def __init__(self, clock: Callable[[], float], out: TextIO = sys.stderr) -> None:
        self._clock = clock
        self._out = out
        self._live = out.isatty()
        self._ends: deque[float] = deque()
        self._name, self._sessions, self._ended_sessions = "", 0, 0
        self._in_flight = self._ended = self._failed = 0

    def begin(self, name: str, sessions: int) -> None:
        """A stage begins."""
        self._name, self._sessions, self._ended_sessions = name, sessions, 0
        self._in_flight = self._ended = self._failed = 0
        self._ends.clear()

    def sent(self) -> None:
        """A request goes out."""
        self._in_flight += 1

    def ended(self, failed: bool) -> None:
        """A request has ended."""
        self._in_flight -= 1
        self._ended += 1
        self._failed += failed
        self._ends.append(self._clock())

    def session_ended(self) -> None:
        """A session has sent all its requests, or will send no more."""
        self._ended_sessions += 1

    @property
    def in_flight(self) -> int:
        """Requests that run."""
        return self._in_flight

    def line(self) -> str:
        """Where the stage stands."""
        now = self._clock()
        while self._ends and self._ends[0] < now - WINDOW_SECONDS:
            self._ends.popleft()
        span = min(WINDOW_SECONDS, now - self._ends[0]) if self._ends else 0.0
        rate = f", {len(self._ends) / span:.1f}/s" if span > 0 else ""
        return f"{self._bar()}{self._so_far()}, {self._in_flight} in flight{rate}"

    def _bar(self) -> str:
        """How much of the stage has ended; on a terminal alone."""
        if not self._live or not self._sessions:
            return ""
        filled = BAR_CHARACTERS * self._ended_sessions // self._sessions
        return f"[{'#' * filled}{'.' * (BAR_CHARACTERS - filled)}] "

    def _so_far(self) -> str:
        return f"{self._name}: {self._ended} requests ended, {self._failed} failed ({self._sessions} sessions)"

    def show(self, text: str) -> None:
        """A line that stays."""
        print(f"\r\x1b[2K{text}" if self._live else text, file=self._out, flush=True)

    async def run(self) -> None:
        """Show where the stage stands, until cancelled."""
        while True:
            await asyncio.sleep(LIVE_SECONDS if self._live else LINE_SECONDS)
            if self._live:
                print(f"\r\x1b[2K{self.line()}", end="", file=self._out, flush=True)
            else:
                self.show(self.line())

    def end(self) -> None:
        """The stage has ended."""
        self.show(self._so_far())
