"""Numbers on their way from the device to the host, which nothing waits for."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch


class Arrivals:
    """Calls that wait until the device has done what was queued before them."""

    def __init__(self) -> None:
        self._pending: list[tuple[torch.cuda.Event, Callable[[], None]]] = []

    def fetch(self, values: torch.Tensor, take: Callable[[np.ndarray], None]) -> None:
        """Hand numbers to a function when they have arrived on the host."""
        if not values.is_cuda:
            take(values.numpy())
            return
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        host.copy_(values, non_blocking=True)
        self.after_device(lambda: take(host.numpy()))

    def after_device(self, call: Callable[[], None]) -> None:
        """Call when the device has done what is queued."""
        if not torch.cuda.is_available():
            call()
            return
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        self._pending.append((event, call))

    def collect(self) -> None:
        """Make the calls whose time has come, in their order."""
        while self._pending and self._pending[0][0].query():  # type: ignore[no-untyped-call]
            self._pending.pop(0)[1]()
