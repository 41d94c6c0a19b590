"""Whether sparse attention pays: the time of dense and of sparse rows, predicted from numbers of the GPU and the model.

Only what differs is added up; the linear layers cost the same either way. **Decoding:** a row that reads lists saves
the bytes of its context in the layers that read lists, and pays for those of its lists and for what choosing scores; so
its gain is linear in its context. What a method launches in each layer is paid once for all rows of a step. **Prompt
chunks:** each is served alone, so its own numbers decide, never its neighbours': tokens, context and settings.

Constants are in `vllm_sparse.step.gpu_table`. What is in doubt is dense.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from vllm_sparse.methods.decode import BatchDecodeMethod
from vllm_sparse.methods.prefill import mean_reach
from vllm_sparse.step.roles import held_roles

if TYPE_CHECKING:
    from vllm_sparse.methods.decode import DecodeMethod
    from vllm_sparse.methods.prefill import PrefillMethod
    from vllm_sparse.step.gpu_table import GpuCosts
    from vllm_sparse.step.roles import Role

MICROSECOND = 1e-6
# The largest that counts as small (`GpuCosts.small_head_share`).
SMALL_HEAD = 64
# Of the four launches more that exact scores of candidates take.
CANDIDATES_US = 12
# Share of the dense kernel's speed that is left to rows with lists: tiles of 128 query rows are full, or half empty.
FULL_TILE_ROWS = 128
FULL_TILE_EFFICIENCY, HALF_TILE_EFFICIENCY = 0.7, 0.52


@dataclass(frozen=True)
class AttentionShape:
    """A model's attention as one process has it.

    Attributes:
        num_layers: attention layers of the model.
        query_heads: of one process.
        kv_heads: of one process.
        head_size: numbers of a key.
        kv_token_bytes: keys and values of a token in one layer, all KV heads of the process.
        linear_flops: of a token in the linear layers beside one attention layer, of one process; 0 where not known.
        held: numbers of the layers that the process holds; None: all.
    """

    num_layers: int
    query_heads: int
    kv_heads: int
    head_size: int
    kv_token_bytes: int
    linear_flops: float = 0.0
    held: range | None = None

    @property
    def number_bytes(self) -> int:
        """Of a number of a key in the cache: 1 of an FP8 one."""
        return self.kv_token_bytes // (2 * self.kv_heads * self.head_size)

    @property
    def layers(self) -> range:
        """Numbers of the layers that the process holds."""
        return range(self.num_layers) if self.held is None else self.held


@dataclass(frozen=True)
class RowGain:
    """What a decode row saves a step by reading lists, what is launched for all rows aside.

    Attributes:
        roles: of the layers, for which this holds.
        seconds_per_token: of its context.
        constant_seconds: what it pays whatever its context.
    """

    roles: tuple[Role, ...]
    seconds_per_token: float
    constant_seconds: float

    def at(self, seq_len: int) -> float:
        """Seconds with a context of so many tokens; negative where the row is slower than dense."""
        return self.seconds_per_token * seq_len - self.constant_seconds


@dataclass(frozen=True)
class LaunchCosts:
    """What a method's launches cost a step, in seconds.

    Attributes:
        alone: all rows of the step decode by it.
        choosing: part of `alone` that goes to the choice.
        reading_layers: layers with a launch over lists.
    """

    alone: float
    choosing: float
    reading_layers: int


class StepCosts:
    """Predicts what sparse rows of a step gain over dense ones.

    Args:
        gpu: its constants.
        shape: of the model.
        in_graphs: methods that CUDA graphs hold, as the server's configuration sets them; a graph of mixtures holds
            all of them.
    """

    def __init__(self, gpu: GpuCosts, shape: AttentionShape, in_graphs: Sequence[DecodeMethod]) -> None:
        self.gpu = gpu
        self.shape = shape
        self._in_graphs = {method.name: self._launches(method) for method in in_graphs}
        reading = max((launches.reading_layers for launches in self._in_graphs.values()), default=0)
        choosing = sum(launches.choosing for launches in self._in_graphs.values())
        self._outside = len(shape.layers) * gpu.outside_us * MICROSECOND
        self._mixed = choosing + reading * (gpu.reading_us + gpu.beside_us) * MICROSECOND

    @property
    def outside_seconds(self) -> float:
        """What a row has to gain that makes its step leave the CUDA graphs."""
        return self.gpu.doubt * self._outside + self.margin_seconds

    @property
    def margin_seconds(self) -> float:
        """What a step has to gain to be sparse."""
        return self.gpu.margin_us * MICROSECOND

    def row_gain(self, method: DecodeMethod, roles: tuple[Role, ...]) -> RowGain:
        """What a decode row gains; worked out once a request, and again where layers of it went dense.

        Args:
            method: of the row.
            roles: of its layers.
        """
        gpu, token_bytes = self.gpu, self.shape.kv_token_bytes
        choosing = gpu.choosing_of(method.name)
        reads = sum(role.reads_list for role in roles)
        writes = sum(role.writes_list for role in roles)
        list_tokens = method.longest_list_tokens if isinstance(method, BatchDecodeMethod) else method.budget_tokens
        scored_bytes = self._scored_share(method) * token_bytes
        constant = (
            reads * list_tokens * token_bytes / gpu.list_bytes_per_second
            + writes * choosing.row_us * MICROSECOND
            # Candidates' keys, without their values.
            + writes * method.candidate_tokens * token_bytes / 2 / gpu.scored_bytes_per_second
        )
        saved = reads * token_bytes / gpu.dense_rate(self.shape.number_bytes)
        scored = writes * scored_bytes / gpu.scored_bytes_per_second
        return RowGain(roles, saved - gpu.doubt * scored, gpu.doubt * constant)

    def _scored_share(self, method: DecodeMethod) -> float:
        """Bytes read to choose from a context, of those of its keys and values."""
        share = self.gpu.choosing_of(method.name).scored_share
        if share is not None:
            return share
        if method.summaries is not None:
            head_size, number_bytes = self.shape.head_size, self.shape.number_bytes
            return method.summaries.bytes_per_token(head_size, number_bytes) / (2 * head_size * number_bytes)
        return 0.5 if isinstance(method, BatchDecodeMethod) and method.scores_tokens else 0.0

    def _launches(self, method: DecodeMethod) -> LaunchCosts:
        roles = held_roles(tuple(method.layer_roles(self.shape.num_layers)), self.shape.layers)
        reads = sum(role.reads_list for role in roles)
        layer_us = self.gpu.choosing_of(method.name).launches_us + (CANDIDATES_US if method.candidate_tokens else 0)
        choosing = sum(role.writes_list for role in roles) * layer_us * MICROSECOND
        return LaunchCosts(choosing + reads * self.gpu.reading_us * MICROSECOND, choosing, reads)

    def launch_seconds(self, methods: Collection[str], all_sparse: bool, full_graph: bool) -> float:
        """What a step pays for launches that a dense one does not have.

        Args:
            methods: of the step's sparse rows, at least one.
            all_sparse: no row is dense.
            full_graph: the step replays a FULL graph.
        """
        if not full_graph:
            # The host launches the layers one by one, and what it launches takes longer than what the device runs.
            return self._outside * len(methods)
        if len(methods) > 1:
            return self._mixed
        (name,) = methods
        launches = self._in_graphs[name]
        beside = 0.0 if all_sparse else launches.reading_layers * self.gpu.beside_us * MICROSECOND
        return launches.alone + beside

    def sparse_methods(
        self, gains: Mapping[str, float], forced: Collection[str], all_sparse: bool, full_graph: bool
    ) -> tuple[frozenset[str], float]:
        """Methods whose rows of a step are sparse: those that make the step fastest, none unless it gains enough.

        Args:
            gains: by method, what its rows gain together in seconds, launches aside.
            forced: methods of rows that are sparse in any case; in `gains` too.
            all_sparse: no row of the step is dense if all these methods' are sparse.
            full_graph: the step replays a FULL graph.

        Returns:
            The methods, and the seconds that the step gains, 0 if there are none.
        """
        found: tuple[str, ...] = ()
        best = float("-inf") if forced else self.margin_seconds
        # In the order of the rows, and so the same in all processes of a model, to the last bit.
        for choice in (tuple(gains), *((name,) for name in gains)):
            if choice and set(choice).issuperset(forced):
                alone = all_sparse and len(choice) == len(gains)
                paid = self.gpu.doubt * self.launch_seconds(choice, alone, full_graph)
                net = sum(gains[name] for name in choice) - paid
                if net > best:
                    best, found = net, choice
        return frozenset(found), best if found else 0.0

    def chunk_cost(self, method: PrefillMethod, query_tokens: int, seq_len: int) -> float:
        """Time of a sparse prompt chunk, in times of a dense one; below 1 it is faster.

        Args:
            method: of the request's prompt.
            query_tokens: of the prompt chunk.
            seq_len: tokens in the request's cache, those of the chunk included.
        """
        linear = query_tokens * self.shape.linear_flops / self.gpu.dense_flops
        sparse = linear + self.chunk_seconds(method, query_tokens, seq_len)
        # The device waits for the host where it is done sooner; hosts differ.
        sparse = max(sparse, self.gpu.doubt * self.gpu.selection_of(method.name).host_us * MICROSECOND)
        return sparse / (linear + self.dense_chunk_seconds(query_tokens, seq_len))

    def dense_chunk_seconds(self, query_tokens: int, seq_len: int) -> float:
        """Dense attention of a prompt chunk in one layer; arguments as of `chunk_cost`."""
        pairs = query_tokens * mean_reach(query_tokens, seq_len)
        share = self.gpu.small_head_share if self.shape.head_size <= SMALL_HEAD else 1.0
        return 4 * pairs * self.shape.query_heads * self.shape.head_size / (self.gpu.dense_flops * share)

    def chunk_seconds(self, method: PrefillMethod, query_tokens: int, seq_len: int) -> float:
        """Choosing and attending of a sparse prompt chunk in one sparse layer; arguments as of `chunk_cost`."""
        shape, selection = self.shape, self.gpu.selection_of(method.name)
        dense = self.dense_chunk_seconds(query_tokens, seq_len)
        sharing = shape.query_heads // method.list_heads(shape.query_heads, shape.kv_heads)
        full = method.query_block_tokens * sharing >= FULL_TILE_ROWS
        density = min(method.read_tokens(query_tokens, seq_len) / mean_reach(query_tokens, seq_len), 1.0)
        attention = density * dense / (FULL_TILE_EFFICIENCY if full else HALF_TILE_EFFICIENCY)
        choosing = selection.dense_share * dense * self._work_of_knobs(method, seq_len)
        return selection.launches_us * MICROSECOND + choosing + attention

    def _work_of_knobs(self, method: PrefillMethod, seq_len: int) -> float:
        """What choosing costs with a method's knobs, in times of those that were measured; never less."""
        heads = self.shape.query_heads, self.shape.kv_heads
        measured = _measured(type(method))
        return max(method.selection_work(seq_len, *heads) / measured.selection_work(seq_len, *heads), 1.0)


@lru_cache
def _measured(method: type[PrefillMethod]) -> PrefillMethod:
    return method.measured()
