"""The batches, the network's export, and a whole training run in miniature."""

import json
import random
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import Tensor  # noqa: E402

from loadtest.model.batches import BatchMaker, Mixture  # noqa: E402
from loadtest.model.network import Architecture, Network, export, load_weights  # noqa: E402
from loadtest.model.train import Settings, Stage, Trial, train  # noqa: E402
from loadtest.text.needles import filler  # noqa: E402
from loadtest.text.tokenizer import build_tokenizer  # noqa: E402

TOKENIZER = build_tokenizer()


@pytest.fixture(scope="module")
def maker() -> BatchMaker:
    pool = TOKENIZER.encode(filler(random.Random(1), 5000), add_special_tokens=False).ids
    return BatchMaker(TOKENIZER, np.array(pool, dtype=np.int32), torch.device("cpu"), 0)


@pytest.mark.parametrize("mixture", [Mixture(256, 32, 6, 5, 0.8), Mixture(512, 16, 12, 10), Mixture(4096, 2, 64, 24)])
def test_batches_are_what_the_tokenizer_makes_of_their_text(maker: BatchMaker, mixture: Mixture) -> None:
    batch = maker(mixture)
    for row in batch.inputs.tolist():
        tokens = [token for token in row if token]
        text = TOKENIZER.decode(tokens, skip_special_tokens=False)
        assert TOKENIZER.encode(text, add_special_tokens=False).ids == tokens
    assert batch.valid.any(dim=1).all()
    for row, answer in torch.nonzero(batch.valid).tolist():
        at, back = int(batch.value_at[row, answer]), int(batch.distance[row, answer])
        target = batch.targets[row]
        assert torch.equal(target[at : at + 2], target[at - back : at - back + 2])
        assert (batch.answer_weight[row, at : at + 2] > 1).all()
    assert not ((batch.answer_weight > 0) & (batch.filler_weight > 0)).any()


def test_first_weights_look_back_and_for_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def spy(query: Tensor, key: Tensor, value: Tensor, **options: bool) -> Tensor:
        scores = query @ key.repeat_interleave(query.shape[1] // key.shape[1], dim=1).mT / query.shape[-1] ** 0.5
        later = torch.ones_like(scores, dtype=torch.bool).triu(1)
        seen.append(scores.masked_fill(later, -torch.inf).softmax(-1).mean(0))
        out: Tensor = attend(query, key, value, **options)
        return out

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    torch.manual_seed(0)
    network = Network(Architecture(TOKENIZER.get_vocab_size(), layers=3), torch.float32)
    # In each of 20 rows 16 records of four tokens, then the first three tokens again.
    ids = torch.rand(20, TOKENIZER.get_vocab_size()).argsort(1)[:, :64]
    with torch.no_grad():
        network(torch.cat((ids, ids[:, :3]), dim=1))
    places, matches, more = seen
    for head in range(4):
        assert places[head].diagonal(-(head + 1)).mean() > 0.6
    # After "key is" the value's first token, after "key is first" its second one.
    assert matches[0, 65, 2] > 0.15
    assert matches[2, 66, 3] > 0.15
    # The same for a value four tokens after its key, and for the token after an earlier occurrence of the last one.
    assert more[0, 65, 4] > 0.1
    assert more[2, 66, 3] > 0.04


def test_export_gives_the_same_logits_in_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = Architecture(TOKENIZER.get_vocab_size(), layers=2)
    torch.manual_seed(0)
    export(Network(sizes, torch.float32), tmp_path)
    ours = Network(sizes, torch.float32)
    load_weights(ours, tmp_path)
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tokens = torch.randint(10, 3000, (2, 200))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-4, rtol=1e-4)


def test_whole_run_in_miniature(tmp_path: Path) -> None:
    settings = Settings(
        out=tmp_path / "model",
        seconds=3.0,
        device="cpu",
        sentences=1000,
        layers=2,
        stages=(Stage(Mixture(256, 2, 3, 2), 0.5), Stage(Mixture(512, 1, 5, 4), 0.5)),
        trials=(Trial(512, 2, 2, 2),),
        report_every=10,
    )
    assert len(train(settings)) == 1
    folder = tmp_path / "model"
    written = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert written < {path.name for path in folder.iterdir()}
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == TOKENIZER.get_vocab_size()
    assert "test 512 tokens, 2 needles, 2 asked" in (folder / "train.log").read_text()
