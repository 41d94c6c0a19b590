"""Which layers of `tokentopk` may reuse lists: the lists of told steps, and the command."""

from __future__ import annotations

import json
import re
import statistics
from functools import partial
from pathlib import Path

import pytest
import torch

from tests import oracle
from tests.test_calibrate_tidal import HEAD_SIZE, HEADS, KV_HEADS, MODEL, SCALE, layer_of, scores_of
from tests.test_command import run_installed
from vllm_sparse.calibration.decode_search import modelled_cost
from vllm_sparse.calibration.decoding import RoleLists
from vllm_sparse.calibration.tokentopk_command import CODE_SHARE, main
from vllm_sparse.calibration.tokentopk_lists import coded_lists
from vllm_sparse.config.request import resolve
from vllm_sparse.config.server import parse_server_config
from vllm_sparse.methods.decode import LayerMemory
from vllm_sparse.methods.token_topk import TokenTopk
from vllm_sparse.step.roles import Role


@pytest.mark.parametrize("page_tokens", [16, 128])
@pytest.mark.parametrize(("sink", "recent"), [(4, 8), (0, 0)])
def test_lists_of_told_steps_are_those_that_the_method_selects(
    page_tokens: int, sink: int, recent: int, generator: torch.Generator
) -> None:
    """Steps that fill a page, and ones within it."""
    method = TokenTopk(budget_tokens=140, sink_tokens=sink, recent_tokens=recent, page_tokens=page_tokens)  # type: ignore[arg-type]
    query, key = layer_of(387, 5, generator)
    grouped = query.view(KV_HEADS, -1, 5, HEAD_SIZE)
    found = coded_lists(method, grouped, key, scores_of(query, key), SCALE)
    for step in range(5):
        context = 387 - 5 + 1 + step
        data = oracle.paged(oracle.PLAIN, [key[:, :context]], [key[:, :context]], 128, generator)
        lists = method.select(query[:, step], data.reader(0), SCALE, 1, LayerMemory())
        expected = torch.stack([oracle.kept_positions(lists, row, context) for row in range(KV_HEADS)])
        assert torch.equal(found[:, 0, step, :context], expected)
        assert not found[:, :, step, context:].any(), "tokens of later steps"


def test_a_layer_reads_the_list_of_its_role(generator: torch.Generator) -> None:
    method = TokenTopk(budget_tokens=100, sink_tokens=4, recent_tokens=8, dense_layers=1, reuse_layers=(2, 3))
    lists = RoleLists(method.layer_roles(5), partial(coded_lists, method))
    layers = [layer_of(300, 3, generator) for _ in range(5)]
    found = []
    for number, (query, key) in enumerate(layers):
        grouped = query.view(KV_HEADS, -1, 3, HEAD_SIZE)
        found.append(lists.listed(number, grouped, key, scores_of(query, key), SCALE))
    assert found[0] is None
    for reading, choosing in ((1, 1), (2, 1), (3, 1), (4, 4)):
        listed = found[reading]
        assert listed is not None
        query, key = layers[choosing]
        grouped = query.view(KV_HEADS, -1, 3, HEAD_SIZE)
        assert torch.equal(listed, coded_lists(method, grouped, key, scores_of(query, key), SCALE))


def test_cost_is_what_attention_and_codes_are_read() -> None:
    roles = [Role.DENSE, Role.WRITE_AND_READ, Role.READ, Role.READ]
    assert modelled_cost(roles, 256, 1024, CODE_SHARE) == pytest.approx((1 + 3 * 0.25 + 1 / 16) / 4)
    assert modelled_cost([Role.DENSE, Role.READ], 4096, 1024, CODE_SHARE) == 1


def test_the_command_calibrates_the_bundled_model(tmp_path: Path) -> None:
    """Under wide bounds each layer after the first that chooses reuses its list; the server takes what is written."""
    output = tmp_path / "found.json"
    sizes = ["--tokens", "1200", "--count", "1", "--budgets", "128", "256", "--dense-layers", "1"]
    ended = run_installed(
        "calibrate", "tokentopk", str(MODEL), "--output", str(output), *sizes, "--divergence", "99", "--same", "0"
    )
    assert ended.returncode == 0, ended.stderr
    assert "prompt 1 of 1" in ended.stdout
    written = json.loads(output.read_text())
    assert written["sparse"]["tokentopk"] == {
        "budget_tokens": 128,
        "dense_layers": 1,
        "reuse_layers": [2, 3, 4, 5, 6, 7],
    }
    config = parse_server_config({"sparse": {"methods": ["tokentopk"], **written["sparse"]}}, 8, HEADS)
    decode = resolve({"sparse_decode": "tokentopk"}, config, 8).decode
    assert decode == TokenTopk(budget_tokens=128, dense_layers=1, reuse_layers=(2, 3, 4, 5, 6, 7))
    rows = [line for line in ended.stdout.splitlines() if line.startswith("| 128 |")]
    assert len(rows) == 1 + 6 + 6, "none, each alone, and each joins"
    divergence = [float(row.split("|")[3]) for row in rows]
    assert divergence[-1] != divergence[0], "old lists are no fresh ones"


def test_bounds_keep_layers_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The largest set within a bound that not all layers fit, and none that even fresh lists break."""
    output = tmp_path / "found.json"
    sizes = ["--output", str(output), "--tokens", "1200", "--count", "1", "--budgets", "128", "--same", "0"]
    main([str(MODEL), *sizes, "--divergence", "99"])
    divergence = [float(row.split("|")[3]) for row in capsys.readouterr().out.splitlines() if row.startswith("| 128 |")]
    bound = max(statistics.median(divergence[-7:]), divergence[0]) + 1e-5
    main([str(MODEL), *sizes, "--divergence", str(bound)])
    told = capsys.readouterr().out
    verdicts = re.findall(r"\| 128 \| [0-9 ]+ \| (\S+) \| \S+ \| \S+ \| (stays|without \d+) \|", told)
    assert len(verdicts) == 7
    for changed, verdict in verdicts:
        assert (verdict == "stays") == (float(changed) <= bound)
    found = json.loads(output.read_text())["sparse"]["tokentopk"]["reuse_layers"]
    assert len(found) == sum(verdict == "stays" for _, verdict in verdicts)
    assert float(re.findall(r"; KL ([0-9.]+)", told)[0]) <= bound
    with pytest.raises(SystemExit):
        main([str(MODEL), *sizes, "--divergence", str(divergence[0] / 2)])
    assert "no budget stays within the bounds" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dense-layers", "7"], "--dense-layers 7: the model has 8 layers, so 0 to 6 are allowed"),
        (["--divergence", "nan"], "--divergence nan: 0 or more is"),
        (["--same", "1.5"], "--same 1.5: 0 to 1 is"),
        (["--budgets", "64"], "--budgets 64: .*do not hold sink_tokens 16 and recent_tokens 64"),
        (["--tokens", "2000", "--count", "1", "--budgets", "2000"], "shortest prompt has .*must not hold all of them"),
    ],
)
def test_the_command_names_what_is_wrong(
    tmp_path: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([str(MODEL), "--output", str(tmp_path / "a.json"), *options])
    assert ended.value.code == 2
    assert re.search(message, capsys.readouterr().err.replace("\n", " "))
