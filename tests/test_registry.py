"""A method that is in the registry is everywhere: configuration, request keys, routes and the chart's schema."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
# In a process of its own: what follows from the registry is worked out when it is imported.
MADE_UP = """
import sys
from typing import Annotated, ClassVar
from pydantic import Field
from pydantic.dataclasses import dataclass
from vllm_sparse.methods import registry
from vllm_sparse.methods.knobs import KNOBS
from vllm_sparse.methods.streaming import Streaming


@dataclass(frozen=True, config=KNOBS)
class Sink(Streaming):
    name: ClassVar[str] = "sink"
    enabled_by_default: ClassVar[bool] = True
    last_tokens: Annotated[int, Field(ge=0, description="a knob that begins like another method")] = 1


@dataclass(frozen=True, config=KNOBS)
class SinkLast(Streaming):
    name: ClassVar[str] = "sink_last"
    enabled_by_default: ClassVar[bool] = True
    former_names: ClassVar[dict[str, str]] = {"old_name": "tokens"}
    tokens: Annotated[int, Field(ge=0, description="made up")] = 2


registry.PREFILL_METHODS |= {"sink": Sink, "sink_last": SinkLast}
registry.DEFAULT_METHODS += ("sink", "sink_last")

from vllm_sparse.config.messages import SparseParamsError
from vllm_sparse.config.names import is_sparse_key, split_key
from vllm_sparse.config.request import deserialize, resolve
from vllm_sparse.config.server import parse_server_config
from vllm_sparse.server.routes.methods import extras_schema
import jsonschema

assert split_key("sink_last_tokens") == ("sink_last", "tokens")
assert split_key("sink_recent_tokens") == ("sink", "recent_tokens")
assert split_key("sinking") == ("", "sinking")
assert is_sparse_key("sink_last_x") and is_sparse_key("Sink_last") and not is_sparse_key("sinking")

settings = {"prefill": "sink_last", "sink_last": {"tokens": 7}, "sink": {"recent_tokens": 5}}
config = parse_server_config({"sparse": settings}, 4, 4)
assert config.knobs("sink_last") == {"tokens": 7} and "sink_last" in config.methods
assert resolve({}, config, 4).prefill == SinkLast(tokens=7)
params = resolve({"sink_last_tokens": 9}, config, 4)
assert params.prefill == SinkLast(tokens=9) and deserialize(params.serialize()) == params
assert resolve({"sink_last_old_name": 9}, config, 4) == params
assert resolve({"sparse_prefill": "sink"}, config, 4).prefill == Sink(recent_tokens=5)
try:
    resolve({"sink_last_token": 9}, config, 4)
except SparseParamsError as error:
    assert "sink_last_token is no knob" in str(error) and "sink_last_tokens" in str(error), error
else:
    raise AssertionError("an unknown knob was taken")

schema = jsonschema.Draft202012Validator(extras_schema(config))
assert schema.is_valid({"sink_last_tokens": 9}) and schema.is_valid({"sink_last_old_name": 9})
assert not schema.is_valid({"sink_last_tokens": "9"}) and not schema.is_valid({"sink_last_token": 9})

from deploy.helm import generate

chart = generate.sparse_schema()["properties"]
assert chart["sink_last"]["properties"]["tokens"]["default"] == 2
assert chart["sink_last"]["properties"]["old_name"]["deprecated"]
assert "sink_last" in chart["prefill"]["enum"] and "sink_last" in chart["methods"]["items"]["enum"]
print("everywhere")
"""


def test_a_made_up_method_whose_name_holds_an_underscore() -> None:
    ended = subprocess.run([sys.executable, "-c", MADE_UP], capture_output=True, text=True, check=False, cwd=ROOT)
    assert ended.stdout.endswith("everywhere\n"), ended.stderr
