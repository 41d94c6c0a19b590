"""The bundled model in a larger geometry: the same logits, the same answers, and sizes that cannot hold it."""

import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file  # noqa: E402
from torch import Tensor  # noqa: E402

from loadtest.model.network import Architecture  # noqa: E402
from loadtest.model.widen import BUNDLED, GeometryError, bundled_sizes, check_geometry, widened, write_widened  # noqa: E402
from loadtest.text.needles import needle_prompt, score  # noqa: E402
from loadtest.text.tokenizer import build_tokenizer, chat_text, count_tokens  # noqa: E402
from vllm_sparse.methods.tidal import Tidal  # noqa: E402
from vllm_sparse.step.roles import Role  # noqa: E402

SMALL = bundled_sizes()
# No size is a power of two times the bundled model's throughout, and the layers do not divide evenly.
WIDE = replace(SMALL, layers=11, hidden=384, query_heads=12, kv_heads=3, head_size=128, mlp=1000)
TOKENIZER = build_tokenizer()
PROMPT = needle_prompt(random.Random(3), 1500, lambda text: count_tokens(TOKENIZER, text), needles=4)
TOKENS = TOKENIZER.encode(chat_text(PROMPT.content), add_special_tokens=False).ids


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("wide")
    write_widened(WIDE, made)
    return made


def _logits(model: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(torch.tensor([TOKENS])).logits[0]
        return logits


def test_logits_are_the_bundled_models(folder: Path) -> None:
    bundled = transformers.AutoModelForCausalLM.from_pretrained(BUNDLED, dtype=torch.float32)
    wide = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(folder)).float()
    # Before they are rounded to bfloat16: what is left is the order of the sums.
    weights = load_file(BUNDLED / "model.safetensors")
    exact = {name: weight for part in widened(weights, SMALL, WIDE) for name, weight in part.items()}
    missing, unexpected = wide.load_state_dict(exact, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    wide.tie_weights()
    wanted, got = _logits(bundled), _logits(wide)
    assert (got - wanted).norm() / wanted.norm() < 1e-4


def test_folder_answers_right(folder: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert model.num_parameters() > 3 * 11 * 1000 * 384
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer.apply_chat_template(PROMPT.messages, add_generation_prompt=True, return_dict=False)
    assert tokens == TOKENS
    generated = model.generate(torch.tensor([tokens]), max_new_tokens=16)[0, len(tokens) :]
    assert score(PROMPT, tokenizer.decode(generated)) == 1


def test_index_names_every_parameter_and_its_file(folder: Path) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = {path.name: load_file(path) for path in folder.glob("*.safetensors")}
    assert index["weight_map"] == {name: file for file, content in files.items() for name in content}
    assert index["metadata"]["total_size"] == sum(
        weight.nbytes for content in files.values() for weight in content.values()
    )


def test_what_is_added_is_neither_zero_nor_read(folder: Path) -> None:
    weights = {
        name: weight.float() for path in folder.glob("*.safetensors") for name, weight in load_file(path).items()
    }
    # Layer 1 of 11 follows the bundled model's first layer and copies its attention.
    for projection in ("q_proj", "k_proj", "v_proj"):
        real, copy = (weights[f"model.layers.{number}.self_attn.{projection}.weight"] for number in (0, 1))
        assert torch.equal(real, copy)
        assert (real.view(-1, WIDE.head_size, WIDE.hidden).norm(dim=(1, 2)) > 0.1).all()
    assert (weights["model.layers.1.mlp.gate_proj.weight"].norm(dim=1) > 0.1).all()
    assert not weights["model.layers.1.self_attn.o_proj.weight"].any()
    assert not weights["model.layers.1.mlp.down_proj.weight"].any()
    # KV head 2 is a copy of KV head 0, with the query heads that are 0's.
    keys = weights["model.layers.0.self_attn.k_proj.weight"].view(3, WIDE.head_size, WIDE.hidden)[..., : SMALL.hidden]
    queries = weights["model.layers.0.self_attn.q_proj.weight"].view(3, 4, WIDE.head_size, WIDE.hidden)
    assert torch.equal(keys[0], keys[2])
    assert not torch.equal(keys[0], keys[1])
    assert torch.equal(queries[0, ..., : SMALL.hidden], queries[2, ..., : SMALL.hidden])


def test_tidal_chooses_in_the_layers_in_which_the_bundled_model_does(folder: Path) -> None:
    roles = json.loads((folder / "tidal.json").read_text())["roles"]
    # The bundled model chooses in layers 2 and 5, which are layers 3 and 7 of 11.
    chooses_and_three_read = [Role.DENSE_AND_WRITE, Role.READ, Role.READ, Role.READ]
    assert roles == [Role.DENSE] * 3 + 2 * chooses_and_three_read
    method = Tidal(policy=str(folder / "tidal.json"))
    expected = [Role.WRITE_AND_READ if role == Role.DENSE_AND_WRITE else role for role in roles]
    assert method.layer_roles(WIDE.layers) == expected


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"layers": 7}, "--layers 7: the bundled model has 8"),
        ({"hidden": 128}, "--hidden 128: the bundled model has 256"),
        ({"head_size": 96}, "--head-dim 96: give a multiple of the bundled model's 64"),
        ({"query_heads": 32, "kv_heads": 5}, "--heads 32 --kv-heads 5: the heads must be a multiple"),
        ({"query_heads": 8, "kv_heads": 8}, "and 2 or more for each"),
    ],
)
def test_sizes_that_cannot_hold_it_are_refused(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(GeometryError, match=message):
        check_geometry(SMALL, replace(Architecture(SMALL.vocabulary), **sizes))


def test_command_refuses_and_leaves_models_alone(folder: Path, tmp_path: Path) -> None:
    def widen(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "loadtest.model.widen", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    small = widen(str(tmp_path / "model"), "--hidden", "128")
    assert small.returncode == 1
    assert "--hidden 128: the bundled model has 256; give that or more" in small.stderr
    assert not (tmp_path / "model").exists()
    again = widen(str(folder))
    assert again.returncode == 1
    assert "holds a model already" in again.stderr
