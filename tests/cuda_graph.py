"""Capturing what a test replays."""

from __future__ import annotations

from collections.abc import Callable

import torch


def captured(call: Callable[[], None]) -> Callable[[], None]:
    """Replays a call from a CUDA graph; it runs once before, since kernels compile outside of a capture."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay
