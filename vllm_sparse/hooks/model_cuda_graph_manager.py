"""vLLM's `ModelCudaGraphManager` (runner V2): it also captures and replays the graphs of sparse decode steps.

vLLM captures one FULL graph for each batch size. Not needed any more once a backend can have several of each size and
name the one to replay.
"""

from __future__ import annotations

import functools
from typing import Any

from vllm_sparse.backend.decode_graphs import current_graphs


def install() -> None:
    """Wrap the capture and the replay of FULL graphs."""
    from vllm.config.compilation import CUDAGraphMode
    from vllm.v1.worker.gpu.cudagraph_utils import ModelCudaGraphManager

    capture, run = ModelCudaGraphManager.capture, ModelCudaGraphManager.run_fullgraph
    if hasattr(run, "__wrapped__"):
        return

    @functools.wraps(capture)
    def capture_all(self: Any, *args: Any, **kwargs: Any) -> None:
        capture(self, *args, **kwargs)
        graphs = current_graphs()
        # While vLLM measures memory, before there is a cache, its own are enough.
        if graphs is None or self._max_full_descs_to_capture is not None:
            return
        own_graphs, own_shapes = self.graphs, self._capture_descs
        shapes = [
            shape
            for shape in own_shapes.get(CUDAGraphMode.FULL, [])
            if shape.uniform_token_count == 1 and graphs.buffers.holds(shape.num_reqs, 1)
        ]
        if not shapes:
            return
        try:
            self._capture_descs = {CUDAGraphMode.FULL: shapes}
            for name in graphs.launches:
                self.graphs = graphs.captured[name] = {}
                graphs.capturing = name
                kwargs["progress_bar_desc"] = f"Capturing CUDA graphs of sparse decode steps, {name}"
                capture(self, *args, **kwargs)
            graphs.most_rows = max(shape.num_reqs for shape in shapes)
        finally:
            graphs.capturing = None
            self.graphs, self._capture_descs = own_graphs, own_shapes

    @functools.wraps(run)
    def run_fullgraph(self: Any, desc: Any) -> Any:
        graphs = current_graphs()
        name = None if graphs is None else graphs.prepare()
        if graphs is None or name is None:
            return run(self, desc)
        own = self.graphs
        self.graphs = graphs.captured[name]
        try:
            output = run(self, desc)
        finally:
            self.graphs = own
        graphs.replayed(name, desc.num_reqs)
        return output

    ModelCudaGraphManager.capture = capture_all
    ModelCudaGraphManager.run_fullgraph = run_fullgraph
