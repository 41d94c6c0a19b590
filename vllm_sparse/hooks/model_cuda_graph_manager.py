"""vLLM's `ModelCudaGraphManager` (runner V2): it also captures and replays the graphs of sparse decode steps.

vLLM captures one FULL graph for each batch size, and pads a step to the next of its sizes. Not needed any more once a
backend can have several graphs of some sizes and name the one to replay.
"""

from __future__ import annotations

from typing import Any

from vllm_sparse.backend.decode_graphs import current_graphs, graph_sizes
from vllm_sparse.hooks.wrapping import is_wrapped, wraps


def install() -> None:
    """Wrap the capture, the choice and the replay of FULL graphs."""
    from vllm.config.compilation import CUDAGraphMode
    from vllm.v1.worker.gpu.cudagraph_utils import ModelCudaGraphManager

    capture, dispatch = ModelCudaGraphManager.capture, ModelCudaGraphManager.dispatch
    run = ModelCudaGraphManager.run_fullgraph
    if is_wrapped(run):
        return

    @wraps(capture)
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
        graphs.sizes = graph_sizes([shape.num_reqs for shape in shapes], self.vllm_config.parallel_config)
        try:
            for name in graphs.launches:
                self.graphs = graphs.captured[name] = {}
                kept = set(graphs.sizes_of(name))
                self._capture_descs = {CUDAGraphMode.FULL: [shape for shape in shapes if shape.num_reqs in kept]}
                graphs.capturing = name
                kwargs["progress_bar_desc"] = f"Capturing CUDA graphs of sparse decode steps, {name}"
                capture(self, *args, **kwargs)
        finally:
            graphs.capturing = None
            self.graphs, self._capture_descs = own_graphs, own_shapes

    @wraps(dispatch)
    def dispatch_padded(self: Any, num_reqs: int, num_tokens: int, *args: Any, **kwargs: Any) -> Any:
        desc = dispatch(self, num_reqs, num_tokens, *args, **kwargs)
        graphs = current_graphs()
        if graphs is None or desc.cg_mode != CUDAGraphMode.FULL:
            return desc
        size = graphs.padded(desc.num_reqs)
        return desc if size == desc.num_reqs else dispatch(self, size, size, *args, **kwargs)

    @wraps(run)
    def run_fullgraph(self: Any, desc: Any) -> Any:
        graphs = current_graphs()
        name = None if graphs is None else graphs.prepare(desc.num_reqs)
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

    ModelCudaGraphManager.capture, ModelCudaGraphManager.dispatch = capture_all, dispatch_padded
    ModelCudaGraphManager.run_fullgraph = run_fullgraph
