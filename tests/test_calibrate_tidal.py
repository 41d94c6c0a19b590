"""TidalDecode's policy: recall, the dynamic programme, the file, the command, and the setting that names the file."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests import oracle
from tests.test_command import run_installed
from vllm_sparse.calibration.decode_search import modelled_cost
from vllm_sparse.calibration.decoding import RoleLists
from vllm_sparse.calibration.tidal_command import KEYS_SHARE
from vllm_sparse.config.messages import SparseParamsError
from vllm_sparse.config.request import SparseParams, deserialize, resolve
from vllm_sparse.config.salt import cache_salt
from vllm_sparse.config.server import parse_server_config
from vllm_sparse.config.settings import ServerConfig
from vllm_sparse.methods.tidal import Tidal
from vllm_sparse.methods.tidal.calibration import (
    ReuseRecall,
    choose_roles,
    lists_of_steps,
    recall_of,
)
from vllm_sparse.methods.tidal.policy import Measured, Policy, load, shipped
from vllm_sparse.step.roles import Role

MODEL = Path(__file__).parents[1] / "loadtest" / "model" / "weights"
HEADS, KV_HEADS, HEAD_SIZE, SCALE = 4, 2, 32, 0.17
ROLES = [Role.DENSE, Role.DENSE_AND_WRITE, Role.READ, Role.READ]
LAYERS = len(ROLES)


def save(path: Path, roles: list[Any]) -> str:
    path.write_text(json.dumps({"roles": roles}))
    return str(path)


@pytest.fixture
def file(tmp_path: Path) -> str:
    return save(tmp_path / "tidal.json", ROLES)


def configured(file: str, **tidal: Any) -> ServerConfig:
    return parse_server_config({"sparse": {"tidal": {"policy": file, **tidal}}}, LAYERS, HEADS)


# Lists and recall


def scores_of(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Of the queries of the last tokens: ``[kv_heads, group, steps, tokens]``, as `Lists.listed` gets them."""
    kv_heads, tokens, head_size = key.shape
    steps = query.shape[1]
    scores = torch.einsum("kgsd,ktd->kgst", query.view(kv_heads, -1, steps, head_size), key) * SCALE
    return scores.masked_fill(torch.arange(tokens) > torch.arange(tokens - steps, tokens).unsqueeze(1), -torch.inf)


def layer_of(tokens: int, steps: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Query of the last tokens, key of all."""
    query = torch.randn(HEADS, steps, HEAD_SIZE, generator=generator) * 2
    return query, torch.randn(KV_HEADS, tokens, HEAD_SIZE, generator=generator)


@pytest.mark.parametrize("lists", ["kv_head", "query_head"])
@pytest.mark.parametrize(("sink", "recent"), [(4, 8), (0, 0)])
def test_lists_of_steps_are_those_that_the_method_selects(
    lists: str, sink: int, recent: int, generator: torch.Generator
) -> None:
    method = Tidal(budget_tokens=40, sink_tokens=sink, recent_tokens=recent, list_per=lists)  # type: ignore[arg-type]
    query, key = layer_of(300, 5, generator)
    found = lists_of_steps(method, scores_of(query, key))
    for step in range(5):
        context = 300 - 5 + 1 + step
        expected = chosen(method, query[:, step], key[:, :context], generator)
        assert torch.equal(found[:, :, step].flatten(0, 1)[:, :context], expected)
        assert not found[:, :, step, context:].any(), "tokens of later steps"


def test_recall_is_the_mass_that_an_earlier_layers_list_keeps(generator: torch.Generator) -> None:
    """Against float64 softmax and the lists that the method chooses for the very positions."""
    layers, steps = 3, 4
    method = Tidal(budget_tokens=40, sink_tokens=4, recent_tokens=8)
    reuse = ReuseRecall(layers, HEADS, method)
    expected = torch.zeros(layers, layers, HEADS, dtype=torch.float64)
    for tokens in (300, 131):
        lists: list[list[torch.Tensor]] = []
        for layer in range(layers):
            query, key = layer_of(tokens, steps, generator)
            reuse.listed(layer, query, key, scores_of(query, key), SCALE)
            lists.append([])
            for place in range(steps):
                context = tokens - steps + 1 + place
                newest, keys = query[:, place], key[:, :context]
                weight = oracle.probabilities(newest.unsqueeze(0), keys, SCALE, torch.ones(context, dtype=torch.bool))
                lists[-1].append(chosen(method, newest, keys, generator))
                for earlier in range(layer + 1):
                    mask = lists[earlier][place].repeat_interleave(HEADS // KV_HEADS, dim=0)
                    expected[earlier, layer] += (weight[:, 0] * mask).sum(1) / steps / 2
    assert torch.allclose(reuse.mass, expected, atol=1e-5)
    own = torch.stack([expected[layer, layer] for layer in range(layers)])
    for choosing, reading in itertools.combinations(range(layers), 2):
        worst = float((expected[choosing, reading] / own[reading]).min())
        assert reuse.recall[choosing][reading] == pytest.approx(worst, abs=1e-4)
        assert worst < 0.9, "lists of random layers must not serve one another for this test to say anything"


def chosen(method: Tidal, query: torch.Tensor, keys: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """The method's list for one request in a cache of its own: bool ``[lists, context]``."""
    from vllm_sparse.methods.decode import LayerMemory

    data = oracle.paged(oracle.PLAIN, [keys], [keys], 16, generator)
    lists = method.select(query, data.reader(0), SCALE, 1, LayerMemory())
    context = keys.shape[1]
    return torch.stack([oracle.kept_positions(lists, row, context) for row in range(lists.pages.shape[0])])


def test_a_layer_that_attends_alike_is_served_and_another_is_not(generator: torch.Generator) -> None:
    query, key = layer_of(500, 8, generator)
    _, other = layer_of(500, 8, generator)
    reuse = ReuseRecall(3, HEADS, Tidal(budget_tokens=64, sink_tokens=0, recent_tokens=0))
    for layer, keys in enumerate((key, key, other)):
        reuse.listed(layer, query, keys, scores_of(2 * query, keys), SCALE)
    assert reuse.recall[0][1] == pytest.approx(1)
    assert reuse.recall[1][2] < 0.6


def test_a_layer_reads_the_list_of_its_role(generator: torch.Generator) -> None:
    roles = [Role.DENSE, Role.DENSE_AND_WRITE, Role.READ, Role.WRITE_AND_READ]
    method = Tidal(budget_tokens=40, sink_tokens=4, recent_tokens=8)
    policy = RoleLists(roles, lambda query, key, scores, scale: lists_of_steps(method, scores))
    layers = [layer_of(200, 3, generator) for _ in roles]
    scores = [scores_of(*layer) for layer in layers]
    found = [policy.listed(n, *layer, scores[n], SCALE) for n, layer in enumerate(layers)]
    assert found[0] is None
    assert found[1] is None
    for reading, choosing in ((2, 1), (3, 3)):
        listed = found[reading]
        assert listed is not None
        assert torch.equal(listed, lists_of_steps(method, scores[choosing]))


def test_cost_is_what_attention_reads() -> None:
    """Dense layers read everything, choosing ones the keys once again, others their list."""
    roles = [Role.DENSE, Role.DENSE_AND_WRITE, Role.READ, Role.WRITE_AND_READ]
    assert modelled_cost(roles, 256, 1024, KEYS_SHARE) == pytest.approx((1 + 1.5 + 0.25 + 0.75) / 4)
    assert modelled_cost([Role.DENSE, Role.READ], 4096, 1024, KEYS_SHARE) == 1


# The dynamic programme


def every_policy(layers: int, full_layers: int, selections: int) -> list[list[Role]]:
    """All ways to place the selecting layers, the first of them after the full ones."""
    policies = []
    for others in itertools.combinations(range(full_layers + 1, layers), selections - 1):
        selecting = (full_layers, *others)
        policies.append(
            [
                Role.DENSE if n < full_layers else Role.DENSE_AND_WRITE if n in selecting else Role.READ
                for n in range(layers)
            ]
        )
    return policies


def value(policy: list[Role], recall: list[list[float]]) -> tuple[float, float]:
    """Worst, then mean."""
    found = [one for one in recall_of(policy, recall) if one is not None]
    return min(found), sum(found) / len(found)


@st.composite
def recalls(draw: st.DrawFn) -> tuple[list[list[float]], int, int]:
    """A recall table, full layers, selections; few distinct values, so that ties are common."""
    layers = draw(st.integers(2, 8))
    full_layers = draw(st.integers(0, layers - 2))
    selections = draw(st.integers(1, layers - full_layers - 1))
    entry = st.integers(0, 6).map(lambda sixth: sixth / 6)
    return (
        draw(st.lists(st.lists(entry, min_size=layers, max_size=layers), min_size=layers, max_size=layers)),
        (full_layers),
        selections,
    )


@given(recalls())
def test_the_policy_has_the_best_worst_and_then_the_best_mean_recall(
    drawn: tuple[list[list[float]], int, int],
) -> None:
    recall, full_layers, selections = drawn
    roles = choose_roles(recall, full_layers, selections)
    best = max(value(policy, recall) for policy in every_policy(len(recall), full_layers, selections))
    assert value(list(roles), recall) == pytest.approx(best)
    assert roles.count(Role.READ) == len(recall) - full_layers - selections
    assert roles[:full_layers] == [Role.DENSE] * full_layers
    for role, following in itertools.zip_longest(roles, roles[1:]):
        assert (role == Role.DENSE_AND_WRITE) <= (following == Role.READ), "a list is chosen that no layer reads"
    assert Policy(roles).roles == roles


# The file


def test_the_file_comes_back_as_it_was_written(tmp_path: Path) -> None:
    measured = Measured("m", 2048, 16, 64, "kv_head", [100, 90], 32, [None, None, 0.5, 0.25])
    policy = Policy(ROLES, measured, 1024, "list", "by hand")
    policy.save(tmp_path / "tidal.json")
    assert load(str(tmp_path / "tidal.json")).contents == policy


def test_a_policy_tells_the_budget_where_nobody_else_does(tmp_path: Path) -> None:
    path = tmp_path / "tidal.json"
    Policy(ROLES, budget_tokens=512).save(path)
    file = str(path)
    for settings, extras, expected in (
        ({}, {}, 512),
        ({"budget_tokens": 300}, {}, 300),
        ({}, {"tidal_budget_tokens": 400}, 400),
        ({}, {"tidal_reselect_layers": [3]}, 2048),
    ):
        params = resolve({"sparse_decode": "tidal", **extras}, configured(file, **settings), LAYERS)
        assert params.decode is not None
        assert params.decode.budget_tokens == expected


def test_a_policy_tells_what_choosing_layers_read(tmp_path: Path) -> None:
    path = tmp_path / "tidal.json"
    Policy(ROLES, selection_reads="list").save(path)
    for extras, expected in (({}, Role.WRITE_AND_READ), ({"tidal_selection_reads": "everything"}, ROLES[1])):
        params = resolve({"sparse_decode": "tidal", **extras}, configured(str(path)), LAYERS)
        assert params.decode is not None
        assert params.decode.layer_roles(LAYERS)[1] is expected


@pytest.mark.parametrize("name", shipped())
def test_a_shipped_policy_is_known_by_its_name(name: str) -> None:
    policy = load(name).contents
    layers = len(policy.roles)
    config = parse_server_config({"sparse": {"tidal": {"policy": name}}}, layers, HEADS)
    params = resolve({"sparse_decode": "tidal"}, config, layers)
    assert params.decode is not None
    assert isinstance(params.decode, Tidal)
    assert params.decode.layer_roles(layers) == params.decode.with_selection_reads(policy.roles)
    assert params.decode.selection_reads == policy.selection_reads
    assert params.decode.budget_tokens == policy.budget_tokens
    assert policy.note, "says where it comes from"


def test_a_policy_tells_the_roles(file: str) -> None:
    expected = Tidal().with_selection_reads(ROLES)
    assert expected[1] is Role.WRITE_AND_READ, "a file that does not say what choosing layers read"
    assert Tidal(policy=file).layer_roles(LAYERS) == expected
    config = configured(file)
    params = resolve({"sparse_decode": "tidal", "tidal_budget_tokens": 512}, config, LAYERS)
    assert params.decode == Tidal(policy=file, budget_tokens=512)
    again = deserialize(params.serialize()).decode
    assert again is not None
    assert again.layer_roles(LAYERS) == expected


@pytest.mark.parametrize(
    ("extras", "expected"),
    [
        ({"tidal_full_layers": 2}, [Role.DENSE, Role.DENSE, Role.WRITE_AND_READ, Role.READ]),
        (
            {"tidal_full_layers": 0, "tidal_reselect_layers": [2]},
            [Role.WRITE_AND_READ, Role.READ, Role.WRITE_AND_READ, Role.READ],
        ),
        ({"tidal_reselect_layers": [3]}, [Role.DENSE, Role.DENSE, Role.WRITE_AND_READ, Role.WRITE_AND_READ]),
    ],
)
def test_a_request_that_sets_layers_does_not_follow_the_policy(
    file: str, extras: dict[str, Any], expected: list[Role]
) -> None:
    params = resolve({"sparse_decode": "tidal", **extras}, configured(file), LAYERS)
    assert params.decode is not None
    assert params.decode.layer_roles(LAYERS) == expected
    assert params.decode.fingerprint == ""


@pytest.mark.parametrize("knobs", [{"dense_layers": 0}, {"dense_layers": 2}, {"reselect_layers": [3]}])
def test_a_server_has_a_policy_or_layers(file: str, knobs: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"tidal_{next(iter(knobs))} is .*would never be used") as refused:
        configured(file, **knobs)
    assert file in str(refused.value)


def test_only_the_server_names_the_file(file: str) -> None:
    with pytest.raises(SparseParamsError, match="tidal_policy is a setting of the server") as refused:
        resolve({"sparse_decode": "tidal", "tidal_policy": "/etc/passwd"}, ServerConfig(), LAYERS)
    assert "tidal_budget_tokens" in str(refused.value)
    assert "tidal_policy," not in str(refused.value)


def test_another_content_is_another_cache_identity(tmp_path: Path) -> None:
    """Workers and caches know the file by its name, and a server that starts again may find another content there."""
    path = tmp_path / "tidal.json"
    salts = set()
    for roles in (ROLES, [Role.DENSE, Role.DENSE_AND_WRITE, Role.READ, Role.DENSE]):
        load.cache_clear()
        salts.add(cache_salt(SparseParams(decode=Tidal(policy=save(path, roles))), None))
    assert len(salts) == 2
    overridden = cache_salt(SparseParams(decode=Tidal(policy=str(path), dense_layers=1)), None)
    assert overridden not in salts


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("{", "no layer policy"),
        ("[]", "no layer policy"),
        ('{"role": []}', "no layer policy: roles"),
        (json.dumps({"roles": ROLES, "layers": 4}), "no layer policy: layers"),
        (
            json.dumps({"roles": [Role.DENSE, "dense_and_write", "read", "sparse"]}),
            "roles.3: .*dense, dense_and_write, read are",
        ),
        (
            json.dumps({"roles": [Role.DENSE, Role.READ, Role.DENSE_AND_WRITE, Role.READ]}),
            "layer 1 has the role read, but no layer",
        ),
        (
            json.dumps({"roles": [Role.DENSE, Role.DENSE_AND_WRITE, Role.DENSE, Role.DENSE]}),
            "no layer has the role read",
        ),
        (json.dumps({"roles": []}), "no layer has the role read"),
        (json.dumps({"roles": ROLES, "version": 2}), "version"),
    ],
)
def test_a_wrong_file_is_refused_at_start(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "tidal.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=message) as refused:
        configured(str(path))
    assert "tidal_policy" in str(refused.value)
    assert str(path) in str(refused.value)


def test_a_file_of_another_model_is_refused_at_start(file: str) -> None:
    with pytest.raises(ValueError, match="roles of 4 layers; the model has 32"):
        parse_server_config({"sparse": {"tidal": {"policy": file}}}, 32, HEADS)


# The command


def test_the_command_calibrates_the_bundled_model(tmp_path: Path) -> None:
    output = tmp_path / "found.json"
    sizes = ["--tokens", "2000", "--count", "2", "--budgets", "128", "256", "--dense-layers", "1"]
    bounds = ["--selections", "2", "--divergence", "9", "--same", "0"]
    ended = run_installed("calibrate", "tidal", str(MODEL), "--output", str(output), *sizes, *bounds)
    assert ended.returncode == 0, ended.stderr
    assert "prompt 2 of 2" in ended.stdout
    policy = load(str(output)).contents
    assert (len(policy.roles), policy.roles[0], policy.budget_tokens) == (8, Role.DENSE, 128)
    assert policy.measured is not None
    assert (policy.measured.budget, len(policy.measured.prompts)) == (128, 2)
    assert policy.measured.divergence is not None
    for role, recall in zip(policy.roles, policy.measured.recall, strict=True):
        assert (role == Role.READ) == (recall is not None)
    rows = [line.strip("|").split("|") for line in ended.stdout.splitlines() if line.startswith("| ")][1:]
    costs = [float(row[0]) for row in rows]
    assert costs == sorted(costs)
    choosing = [n for n, role in enumerate(policy.roles) if role is Role.DENSE_AND_WRITE]
    assert rows[0][2].split() == [str(layer) for layer in choosing], "the cheapest is within wide bounds"
    parse_server_config({"sparse": {"tidal": {"policy": str(output)}}}, 8, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompts", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--dense-layers", "7"], "--dense-layers 7: the model has 8 layers, so 0 to 6 are allowed"),
        (["--selections", "6"], "--selections 6: .*2 of them dense, so 1 to 5 are allowed"),
        (["--recall-floor", "1.5"], "--recall-floor 1.5: 0 to 1 is"),
        (["--same", "-1"], "--same -1.0: 0 to 1 is"),
        (["--budgets", "64"], "--budgets 64: .*do not hold sink_tokens 16 and recent_tokens 64"),
        (["--tokens", "2000", "--count", "1", "--budgets", "2000"], "shortest prompt has .*must not hold all of them"),
        (["--tokens", "16"], "--tokens 16: .*too few"),
    ],
)
def test_the_command_names_what_is_wrong(
    tmp_path: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    import re

    from vllm_sparse.calibration.tidal_command import main

    with pytest.raises(SystemExit) as ended:
        main([str(MODEL), "--output", str(tmp_path / "a.json"), *options])
    assert ended.value.code == 2
    assert re.search(message, capsys.readouterr().err.replace("\n", " "))
