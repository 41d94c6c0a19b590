"""Slots to parameters, driven by vLLM's own batch code."""

from __future__ import annotations

import gc
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from vllm import SamplingParams

from vllm_sparse.config.request import RESOLVED_KEY, SparseParams
from vllm_sparse.hooks.logits_processor import SparseParamsProcessor
from vllm_sparse.methods.decode import LayerMemory
from vllm_sparse.methods.flexprefill import FlexPrefill
from vllm_sparse.methods.tidal import Tidal
from vllm_sparse.step.requests import TABLE, RequestTable, SparseRequest

CHOICES = [
    None,
    SparseParams(FlexPrefill(), None, 0),
    SparseParams(None, Tidal(), 1),
    SparseParams(FlexPrefill(gamma=0.5), Tidal(budget_tokens=512), 2),
]
choices = st.sampled_from(CHOICES)


def params_of(rows: dict[int, SparseRequest]) -> dict[int, SparseParams]:
    """Parameters by row."""
    return {row: request.params for row, request in rows.items()}


def sampling(params: SparseParams | None) -> SamplingParams:
    """Sampling parameters as admission leaves them."""
    if params is None:
        return SamplingParams(extra_args={"another": 1})
    return SamplingParams(extra_args={RESOLVED_KEY: params.serialize()})


class V1Batch(RuleBasedStateMachine):
    """vLLM's own V1 `InputBatch` adds, removes, condenses and swaps; row i must always hold request i's parameters."""

    slots = 6

    def __init__(self) -> None:
        super().__init__()
        from vllm.v1.sample.logits_processor.state import LogitsProcessors
        from vllm.v1.worker.gpu_input_batch import InputBatch

        config: Any = None
        processor = SparseParamsProcessor(config, torch.device("cpu"), False)
        self.batch = InputBatch(
            self.slots, 32, 64, torch.device("cpu"), 16, [16], [2], logitsprocs=LogitsProcessors([processor])
        )
        self.params: dict[str, SparseParams | None] = {}
        self.prompt_tokens: dict[str, int] = {}
        self.made = 0

    def refresh(self) -> None:
        self.batch.condense()
        self.batch.refresh_metadata()

    def add_one(self, params: SparseParams | None) -> None:
        from vllm.v1.worker.gpu_input_batch import CachedRequestState

        name = f"request-{self.made}"
        self.made += 1
        self.params[name] = params
        prompt = [1] * (self.made % 7 + 1)
        self.prompt_tokens[name] = len(prompt)
        self.batch.add_request(CachedRequestState(name, prompt, [], sampling(params), None, ([0, 1],), 0, []))

    @rule(remove=st.sets(st.integers(0, slots - 1)), add=st.lists(choices, max_size=slots))
    def step(self, remove: set[int], add: list[SparseParams | None]) -> None:
        """One scheduler step: finished requests leave, new ones take their places, the rest moves together."""
        names = [self.batch.req_ids[index] for index in remove if index < self.batch.num_reqs]
        for name in names:
            self.batch.remove_request(name)
            del self.params[name]
        for params in add[: self.slots - len(self.params)]:
            self.add_one(params)
        self.refresh()

    @precondition(lambda self: self.batch.num_reqs > 1)
    @rule(pairs=st.lists(st.tuples(st.integers(0, slots - 1), st.integers(0, slots - 1)), min_size=1, max_size=4))
    def swap(self, pairs: list[tuple[int, int]]) -> None:
        """A builder's reordering."""
        for first, second in pairs:
            if first != second and max(first, second) < self.batch.num_reqs:
                self.batch.swap_states(first, second)
        self.batch.refresh_metadata()

    @invariant()
    def rows_hold_their_requests(self) -> None:
        expected = {
            row: self.params[name] for row, name in enumerate(self.batch.req_ids) if self.params[name] is not None
        }
        assert params_of(TABLE.sparse_rows(None, self.batch.num_reqs)) == expected
        # Nothing lingers behind the batch either.
        found = TABLE.sparse_rows(None, self.slots)
        assert params_of(found) == expected
        # A request's memory moves with it and no other gets it.
        for row, request in found.items():
            name = self.batch.req_ids[row]
            assert request.memory.setdefault(0, name) == name
            assert request.prompt_tokens == self.prompt_tokens[name]


V1Batch.TestCase.settings = settings(max_examples=30, stateful_step_count=15, deadline=None)
test_v1_batch = V1Batch.TestCase


class V2Slots(RuleBasedStateMachine):
    """Runner V2 reuses slots without telling that a request left; a row names its slot."""

    def __init__(self) -> None:
        super().__init__()
        self.table = RequestTable()
        self.table.attach(slots_in_metadata=True)
        self.model: dict[int, SparseParams | None] = {}

    @rule(slot=st.integers(0, 7), params=choices)
    def add(self, slot: int, params: SparseParams | None) -> None:
        self.table.set(slot, sampling(params))
        self.model[slot] = params

    @rule(rows=st.lists(st.integers(0, 7), max_size=8), padding=st.integers(0, 3))
    def step(self, rows: list[int], padding: int) -> None:
        expected = {row: self.model[slot] for row, slot in enumerate(rows) if self.model.get(slot) is not None}
        slots = np.array(rows, dtype=np.int32)
        assert params_of(self.table.sparse_rows(slots, len(rows) + padding)) == expected
        decoding = [
            params for _, params in sorted(expected.items()) if params is not None and params.decode is not None
        ]
        assert [request.params for request in self.table.sparse_decodes(slots)] == decoding
        assert self.table.sparse_rows(None, len(rows)) == {}

    @rule(rows=st.lists(st.integers(0, 7), max_size=8))
    def dummy_step(self, rows: list[int]) -> None:
        self.table.dummy_step = True
        assert self.table.sparse_rows(np.array(rows, dtype=np.int32), len(rows)) == {}
        self.table.dummy_step = False


test_v2_slots = V2Slots.TestCase


def test_a_new_runner_starts_with_an_empty_table() -> None:
    table = RequestTable()
    assert not table.attached
    table.set(0, sampling(CHOICES[1]))
    table.attach(slots_in_metadata=False)
    assert table.attached
    assert table.sparse_rows(None, 4) == {}


def test_taking_a_slot_empties_it() -> None:
    table = RequestTable()
    table.set(3, sampling(CHOICES[1]))
    taken = table.take(3)
    assert taken is not None
    assert taken.params == CHOICES[1]
    assert table.take(3) is None


def test_a_request_that_enters_a_slot_finds_no_memory() -> None:
    table = RequestTable()
    for _ in range(2):
        table.set(3, sampling(CHOICES[2]))
        request = table.sparse_rows(None, 4)[3]
        assert not request.memory
        request.memory[0] = LayerMemory([torch.zeros(1)])


def test_the_v2_loader_accepts_and_builds_the_processor() -> None:
    """From the installed entry point, as runner V2 and the front end load it."""
    from vllm.v1.worker.gpu.sample.logits_processor import loader

    assert SparseParamsProcessor in loader._load_v2_logitsprocs(None)
    validate = loader.build_custom_logits_processors_params_validator(None)
    validate(sampling(CHOICES[1]))
    validate(SamplingParams())


def test_runner_v2_tells_how_long_a_prompt_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose slots hold the prompt's length before processors hear of the request."""
    from vllm_sparse.hooks import gpu_model_runner, model_cuda_graph_manager

    for hook in (gpu_model_runner, model_cuda_graph_manager):
        monkeypatch.setattr(hook, "install", lambda: None)
    config: Any = None
    state = SimpleNamespace(prompt_len=SimpleNamespace(np=np.array([0, 0, 700], dtype=np.int32)))
    processor = SparseParamsProcessor(config, state)
    processor.add_request(2, sampling(CHOICES[1]))
    found = TABLE.sparse_rows(np.array([2], dtype=np.int32), 1)
    TABLE.attach(slots_in_metadata=False)
    assert found[0].prompt_tokens == 700


def test_runner_v2_tells_requests_to_earlier_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last one hears of them from its sampler, before and as it does without a pipeline."""
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    from vllm_sparse.hooks import gpu_model_runner

    for name in ("gather_batch_req_state", "add_requests"):
        monkeypatch.setattr(GPUModelRunner, name, lambda *arguments: None)
    gpu_model_runner.install()
    new = [
        SimpleNamespace(req_id="sparse", sampling_params=sampling(CHOICES[1]), prompt_len=700),
        SimpleNamespace(req_id="dense", sampling_params=sampling(None), prompt_len=5),
        SimpleNamespace(req_id="pooled", sampling_params=None, prompt_len=5),
    ]
    slots = SimpleNamespace(req_id_to_index={"sparse": 2, "dense": 1, "pooled": 0})
    found = {}
    for is_last in (True, False):
        TABLE.attach(slots_in_metadata=True)
        runner: Any = SimpleNamespace(is_last_pp_rank=is_last, req_states=slots)
        GPUModelRunner.add_requests(runner, SimpleNamespace(scheduled_new_reqs=new))
        found[is_last] = TABLE.sparse_rows(np.array([0, 1, 2], dtype=np.int32), 3)
    TABLE.attach(slots_in_metadata=False)
    assert found[True] == {}
    assert list(found[False]) == [2]
    assert found[False][2].prompt_tokens == 700


def test_runner_v1_keeps_what_it_knows_of_a_request_that_sits_a_step_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a pipeline it does so every other step, but a preempted request has lost its blocks."""
    from vllm.v1.sample.logits_processor import BatchUpdate
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    from vllm_sparse.hooks import gpu_model_runner_v1

    processor = SparseParamsProcessor(cast("Any", None), torch.device("cpu"), False)
    monkeypatch.setattr(GPUModelRunner, "_update_states", lambda *arguments: None)
    gpu_model_runner_v1.install()
    first, second = sampling(CHOICES[1]), sampling(CHOICES[1])

    def step(removed: list[int], added: list[tuple[int, SamplingParams]]) -> dict[int, SparseRequest]:
        news: Any = [(row, params, [1], []) for row, params in added]
        processor.update_state(BatchUpdate(2, removed, news, []))
        return TABLE.sparse_rows(None, 2)

    held = step([], [(0, first)])[0]
    held.summarised_tokens, held.setting = 40, cast("Any", "of its slot")
    other = step([0], [(0, second)])[0]
    assert other is not held
    rows = step([], [(1, first)])
    assert rows == {0: other, 1: held}
    assert (held.summarised_tokens, held.setting, held.slot, other.slot) == (40, None, 1, 0)
    step([0, 1], [])
    resumed: Any = SimpleNamespace(scheduled_cached_reqs=SimpleNamespace(resumed_req_ids={"a"}))
    runner: Any = SimpleNamespace(requests={"a": SimpleNamespace(sampling_params=first)})
    GPUModelRunner._update_states(runner, resumed)
    rows = step([], [(0, first), (1, second)])
    assert rows[0] is not held
    assert rows[0].summarised_tokens == 0
    assert rows[1] is other
    step([0, 1], [])
    del runner, first, second
    gc.collect()
    assert not TABLE._known, "nothing is kept of requests that the runner has let go"


def test_profiling_takes_all_slots_and_leaves_them_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runner V2 of vLLM 0.33 adds a request to each slot before there is any, with no prompt."""
    from vllm_sparse.hooks import gpu_model_runner, model_cuda_graph_manager

    for hook in (gpu_model_runner, model_cuda_graph_manager):
        monkeypatch.setattr(hook, "install", lambda: None)
    config: Any = None
    slots = np.arange(5, dtype=np.int32)
    processor = SparseParamsProcessor(config, SimpleNamespace(prompt_len=SimpleNamespace(np=np.zeros(5, np.int32))))
    for slot in slots.tolist():
        processor.add_request(slot, SamplingParams.for_sampler_warmup())
    found = TABLE.sparse_rows(slots, 5)
    TABLE.attach(slots_in_metadata=False)
    assert found == {}


def test_the_v1_loader_builds_the_processor_as_argmax_invariant() -> None:
    from vllm.v1.sample.logits_processor import build_logitsprocs

    # build_logitsprocs reads these of the configuration; the processors of vLLM's own need the scheduler's size.
    config: Any = SimpleNamespace(
        speculative_config=None, scheduler_config=SimpleNamespace(max_num_seqs=4), reasoning_config=None
    )
    built = build_logitsprocs(config, torch.device("cpu"), False, False)
    assert any(isinstance(processor, SparseParamsProcessor) for processor in built.argmax_invariant)
    assert not any(isinstance(processor, SparseParamsProcessor) for processor in built.non_argmax_invariant)


def test_logits_are_left_alone() -> None:
    processor = SparseParamsProcessor(None, torch.device("cpu"), False)
    logits = torch.randn(2, 5)
    assert processor.apply(logits) is logits
    assert processor.add_request(0, sampling(None)) is False


@pytest.mark.parametrize("extras", [None, {}, {"sparse_prefill": "flexprefill"}])
def test_only_admitted_settings_count(extras: dict[str, Any] | None) -> None:
    """What admission did not resolve is dense."""
    table = RequestTable()
    table.set(0, SamplingParams(extra_args=extras))
    assert table.sparse_rows(None, 1) == {}
