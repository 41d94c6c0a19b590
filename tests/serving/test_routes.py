"""The plugin's HTTP routes, on two API servers with an API key."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import jsonschema
import pytest

from tests.serving.conftest import CONFIGURATION
from tests.serving.server import MetricsChange, Server, prompt_of

CONFIG, METHODS = "/v1/sparse/config", "/v1/sparse/methods"
# One API server of two misses all of so many connections once in a million times.
MANY = 20

# Extras, and whether the server takes them.
EXTRAS: tuple[tuple[Any, bool], ...] = (
    ({}, True),
    ({"seed": 3, "hipster": 1, "nested": "x"}, True),
    ({"sparse_prefill": "dense", "sparse_decode": "blocktopk", "sparse_min_tokens": 0}, True),
    ({"flexprefill_gamma": 0.5, "flexprefill_query_block_tokens": 64, "flexprefill_list_per": "kv_head"}, True),
    ({"sparse_prefill": "flexprefill", "flexprefill_gamma": 1, "flexprefill_faithful": True}, True),
    ({"sparse_decode": "blocktopk", "blocktopk_budget_tokens": 512}, True),
    ({"sparse_preset": "dense", "sparse_decode": "blocktopk"}, True),
    ({"sparse_preset": "balanced", "sparse_prefill": "flexprefill", "sparse_decode": "blocktopk"}, True),
    ({"sparse_preset": "balanced"}, False),
    ({"sparse_preset": "turbo"}, False),
    ({"sparse_preset": "dense", "flexprefill_gamma": 0.5}, False),
    ({"sparse_prefill": "sale"}, False),
    ({"sparse_prefill": "blocktopk"}, False),
    ({"sparse_prefill": 1}, False),
    ({"sparse_min_tokens": -1}, False),
    ({"sparse_min_tokens": 1.5}, False),
    ({"sparse_method": "flexprefill"}, False),
    ({"Sparse_Prefill": "flexprefill"}, False),
    ({"sparse_resolved": "x"}, False),
    ({"flexPrefill": 1}, False),
    ({"flexprefill_gama": 0.5}, False),
    ({"flexprefill_gamma": "0.5"}, False),
    ({"flexprefill_gamma": 0}, False),
    ({"flexprefill_gamma": 1.01}, False),
    ({"flexprefill_query_block_tokens": 96}, False),
    ({"flexprefill_faithful": "yes"}, False),
    ({"sparse_prefill": "dense", "flexprefill_gamma": 0.5}, False),
    ({"blocktopk_budget_tokens": 512}, False),
    ({"sparse_decode": "blocktopk", "blocktopk_budget_tokens": 8}, False),
    ({"sparse_decode": "blocktopk", "blocktopk_page_tokens": 16}, False),
    ({"sale_tau": 0.1}, False),
)


def config_of(server: Server) -> dict[str, Any]:
    """The answer to GET."""
    reply = server.call("GET", CONFIG)
    assert reply.status_code == 200, reply.text
    answer: dict[str, Any] = reply.json()
    return answer


def put(server: Server, settings: Any, if_match: str | None = None) -> httpx.Response:
    return server.call("PUT", CONFIG, json=settings, headers={} if if_match is None else {"If-Match": if_match})


@pytest.fixture
def changeable(configured_server: Server) -> Iterator[Server]:
    """`configured_server`; as on its command line again afterwards."""
    yield configured_server
    assert put(configured_server, {}).status_code == 200


@pytest.mark.parametrize("method", ["GET", "PUT"])
def test_routes_need_the_api_key(configured_server: Server, method: str) -> None:
    before = config_of(configured_server)
    for path in (CONFIG, METHODS):
        for headers in ({"Authorization": ""}, {"Authorization": "Bearer another key"}):
            reply = configured_server.call(method, path, json={"min_tokens": 1}, headers=headers)
            assert reply.status_code == 401, reply.text
    assert config_of(configured_server) == before


@pytest.mark.parametrize(("extras", "good"), EXTRAS, ids=[str(extras) for extras, _ in EXTRAS])
def test_the_schema_says_what_the_server_takes(configured_server: Server, extras: Any, good: bool) -> None:
    schema = configured_server.call("GET", METHODS).json()["vllm_xargs"]
    jsonschema.Draft202012Validator.check_schema(schema)
    valid = jsonschema.Draft202012Validator(schema).is_valid(extras)
    status = configured_server.complete("Hello.", extras, max_tokens=1).status
    assert (valid, status) == (good, 200 if good else 400)


def test_methods_are_described_with_this_servers_defaults(configured_server: Server) -> None:
    answer = configured_server.call("GET", METHODS).json()
    assert answer["prefill"]["default"] == "flexprefill"
    assert answer["decode"]["default"] == "dense"
    assert list(answer["prefill"]["methods"]) == ["flexprefill"]
    assert list(answer["decode"]["methods"]) == ["blocktopk"]
    knobs = answer["prefill"]["methods"]["flexprefill"]["knobs"]
    assert knobs["flexprefill_min_budget_tokens"] == {
        "description": "least tokens of columns and of diagonals",
        "type": "integer",
        "minimum": 0,
        "maximum": 1 << 24,
        "default": 256,
    }
    assert knobs["flexprefill_divergence_threshold"]["default"] == 0.1
    # A setting of the server is no knob of a request.
    assert "blocktopk_page_tokens" not in answer["decode"]["methods"]["blocktopk"]["knobs"]


def test_the_configuration_is_that_of_the_command_line(configured_server: Server) -> None:
    config = config_of(configured_server)["config"]
    given = CONFIGURATION["sparse"]
    assert {name: config[name] for name in given} == given
    assert (config["preset"], config["decode"], config["tidal"]) == ("dense", None, {})


def test_a_change_reaches_all_api_servers(changeable: Server) -> None:
    """Behaviour, the schema's defaults and the version, whichever API server answers, right after the answer."""
    for round_number in range(2):
        version = config_of(changeable)["version"]
        before = changeable.metrics()
        assert put(changeable, {"prefill": "dense"}).status_code == 200
        assert [config_of(changeable)["version"] for _ in range(MANY)] == [version + 1] * MANY
        for _ in range(MANY):
            assert changeable.complete("Hello.", max_tokens=1).status == 200
        between = changeable.metrics()
        answer = put(changeable, {"prefill": "flexprefill", "flexprefill": {"gamma": 0.5 + round_number / 10}}).json()
        # What a change leaves out is as on the command line.
        assert answer["config"]["flexprefill"] == {"gamma": 0.5 + round_number / 10, "min_budget_tokens": 256}
        for _ in range(MANY):
            # The knob is one of the default method, which only the changed configuration has.
            assert changeable.complete("Hello.", {"flexprefill_divergence_threshold": 0}, max_tokens=1).status == 200
        after = changeable.metrics()
        assert MetricsChange(before, between).requests("prefill", "dense") == MANY
        assert MetricsChange(before, between).requests("prefill", "flexprefill") == 0
        assert MetricsChange(between, after).requests("prefill", "flexprefill") == MANY
        assert MetricsChange(between, after).requests("prefill", "dense") == 0
        defaults = [changeable.call("GET", METHODS).json()["vllm_xargs"]["properties"] for _ in range(MANY)]
        assert {found["flexprefill_gamma"]["default"] for found in defaults} == {0.5 + round_number / 10}


def test_limits_change_while_the_server_runs(changeable: Server) -> None:
    """On all API servers, for streams too, and in the schema."""
    extras = {"flexprefill_min_budget_tokens": 512}
    assert changeable.complete("Hello.", extras, max_tokens=1).status == 200
    assert put(changeable, {"limits": {"budget_tokens": 400}}).status_code == 200
    before = changeable.metrics()
    for number in range(MANY):
        reply = changeable.complete("Hello.", extras, max_tokens=1, stream=number % 2 == 1)
        assert reply.status == 400, reply.raw
        assert (
            "flexprefill_min_budget_tokens is 512; limits.budget_tokens of this server allows at most 400"
            in reply.error
        )
    assert MetricsChange(before, changeable.metrics())("vllm_sparse_requests_total") == 0
    schema = changeable.call("GET", METHODS).json()["vllm_xargs"]["properties"]
    assert schema["flexprefill_min_budget_tokens"]["maximum"] == 400
    assert put(changeable, {"limits": {"stages": 0}}).status_code == 400


def test_changes_are_logged_by_the_api_server_that_made_them(changeable: Server) -> None:
    """One line each, with who, what and which version; and both API servers can make them."""
    for number in range(MANY):
        assert put(changeable, {"min_tokens": 2000 + number % 2}).status_code == 200
    lines = [line for line in changeable.log.read_text().splitlines() if "changed the configuration" in line]
    assert {line.partition(" ")[0] for line in lines} == {"(ApiServer_0", "(ApiServer_1"}
    version = config_of(changeable)["version"]
    assert lines[-1].endswith(
        f"127.0.0.1 changed the configuration, version {version - 1} to {version}: min_tokens 2000 -> 2001"
    )


def test_changed_defaults_have_prefix_caches_of_their_own(changeable: Server) -> None:
    content = prompt_of(60, 1500).content
    assert changeable.chat(content).cached_tokens == 0
    put(changeable, {"flexprefill": {"gamma": 0.8}})
    # Tokens before the minimum are dense, whatever the defaults.
    assert changeable.chat(content).cached_tokens <= 1024
    assert changeable.chat(content).cached_tokens > 1400
    put(changeable, {})
    assert changeable.chat(content).cached_tokens > 1400


@pytest.mark.parametrize(
    ("settings", "status", "message"),
    [
        ({"prefil": "flexprefill"}, 400, "sparse.prefil is 'flexprefill'"),
        ({"prefill": "tidal"}, 400, "allowed are dense, flexprefill"),
        ({"prefill": "sale"}, 400, "does not enable it"),
        (
            {"preset": "quality", "prefill": None},
            400,
            "'quality', whose prefill method dhsa this server does not enable",
        ),
        ({"preset": "turbo"}, 400, "sparse_preset is 'turbo'; allowed are dense, quality"),
        ({"min_tokens": "1"}, 400, "sparse.min_tokens is '1'"),
        ({"flexprefill": {"gamma": 2}}, 400, "flexprefill_gamma is 2; a number above 0 and at most 1"),
        ({"flexprefill": {"gama": 1}}, 400, "flexprefill_gama is no knob"),
        ({"flexprefill": 3}, 400, "sparse.flexprefill is 3"),
        ({"prefill": "dense", "decode": "x"}, 400, "sparse_decode is 'x'"),
        ([], 400, "valid dictionary"),
        ({"methods": ["flexprefill"]}, 409, "sparse.methods is ['flexprefill']; it is ['flexprefill', 'blocktopk']"),
        ({"decode_list_tokens": 64}, 409, "sparse.decode_list_tokens is 64"),
        ({"decode_in_batches": False}, 409, "start the server again"),
        ({"blocktopk": {"page_tokens": 32}}, 409, "sparse.blocktopk.page_tokens is 32; it is 16"),
        # Nobody learns over HTTP which files there are.
        ({"sale": {"calibration": "/etc/passwd"}}, 409, "sparse.sale.calibration is '/etc/passwd'; it is ''"),
    ],
    ids=repr,
)
def test_a_wrong_change_changes_nothing(configured_server: Server, settings: Any, status: int, message: str) -> None:
    before = config_of(configured_server)
    reply = put(configured_server, settings)
    assert reply.status_code == status, reply.text
    assert message in reply.json()["error"]["message"]
    assert [config_of(configured_server) for _ in range(4)] == [before] * 4


def test_text_that_is_no_json_changes_nothing(configured_server: Server) -> None:
    before = config_of(configured_server)
    headers = {"Content-Type": "application/json"}
    assert configured_server.call("PUT", CONFIG, content='{"prefill": ', headers=headers).status_code == 400
    assert config_of(configured_server) == before


def test_a_configuration_can_be_written_back_as_it_was_read(changeable: Server) -> None:
    put(changeable, {"min_tokens": 77})
    read = changeable.call("GET", CONFIG)
    written = put(changeable, read.json()["config"], read.headers["ETag"])
    assert written.status_code == 200, written.text
    # Nothing differs, so nothing is a new version.
    assert written.json() == read.json()
    assert written.headers["ETag"] == read.headers["ETag"]


def test_of_changes_to_one_version_one_counts(changeable: Server) -> None:
    """However many arrive at once, on whichever API server."""
    for round_number in range(4):
        etag = changeable.call("GET", CONFIG).headers["ETag"]
        version = config_of(changeable)["version"]
        replies: dict[int, httpx.Response] = {}
        at_once = threading.Barrier(8)

        def change(min_tokens: int, etag: str = etag, replies: Any = replies, at_once: Any = at_once) -> None:
            at_once.wait()
            replies[min_tokens] = put(changeable, {"min_tokens": min_tokens}, etag)

        writers = [threading.Thread(target=change, args=(100 * round_number + number,)) for number in range(1, 9)]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join()
        won = [min_tokens for min_tokens, reply in replies.items() if reply.status_code == 200]
        assert sorted(reply.status_code for reply in replies.values()) == [200] + [412] * 7
        assert "read it again" in next(r for r in replies.values() if r.status_code == 412).text
        after = config_of(changeable)
        assert (after["version"], after["config"]["min_tokens"]) == (version + 1, won[0])


def test_changes_to_any_version_all_count_one_after_the_other(changeable: Server) -> None:
    version = config_of(changeable)["version"]
    versions: list[int] = []

    def change(min_tokens: int) -> None:
        versions.append(put(changeable, {"min_tokens": min_tokens}).json()["version"])

    writers = [threading.Thread(target=change, args=(5000 + number,)) for number in range(8)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert sorted(versions) == list(range(version + 1, version + 9))


def test_a_restarted_server_has_the_configuration_of_its_command_line(
    configured_server: Server, restarted: Callable[[], Server]
) -> None:
    start = config_of(configured_server)["config"]
    assert put(configured_server, {"prefill": "dense"}).json()["config"] != start
    assert config_of(restarted()) == {"version": 1, "config": start}
