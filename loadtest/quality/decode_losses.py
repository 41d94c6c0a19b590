"""What a real checkpoint loses when decoding reads less, one cause at a time, in this process and on any device.

    python -m loadtest.quality.decode_losses MODEL --tokens 8192 --prompts 16 \
        --rule 'lists of every third layer={"budget_tokens": 512, "choose_every_layers": 3}'

Questions about real texts (`vllm_sparse.quality.tasks`) are prefilled densely once. Dense decoding generates the
answer; each rule then decodes the same tokens, told what to say, with its own keys and values of them in the cache, and
its logits are compared with dense ones. Rules are idealised methods in PyTorch: any layers, ages, merges of heads.

* score: of what the rule would have said at each position of the dense answer, as `vllm-sparse quality` scores answers.
* same: share of positions with dense decoding's most likely token.
* KL: divergence of the next token from dense decoding's, mean over positions, in nats.
* read: tokens read over tokens in reach, in layers that read lists; kept: the attention mass on them, mean over heads,
  and of the head (of a layer, mean over positions) that keeps least.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from pydantic import ConfigDict, TypeAdapter
from pydantic.dataclasses import dataclass as checked_dataclass

from vllm_sparse.calibration.decoding import Decoder, Prefix
from vllm_sparse.calibration.prompts import TASK_KINDS, TaskPrompt, task_prompts
from vllm_sparse.quality.tasks.scoring import score
from vllm_sparse.quality.tasks.task import Task


@checked_dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Rule:
    """Which tokens a layer reads.

    Attributes:
        budget_tokens: of a list, forced ones included.
        dense_layers: first layers, dense.
        choose_every_layers: layers that a list lives, the one that chooses it included.
        choosing_layers: layers that choose, in place of `choose_every_layers`.
        sparse_layers: only these layers read lists; none: all after the dense ones.
        reads_own_list: a layer that chooses reads its list; else everything, as TidalDecode does.
        choose_every_steps: steps that a list lives; new tokens join it.
        merge: how the query heads of a KV head share a list: by the largest of their probabilities, the mean of their
            probabilities, the largest of their raw scores, or not at all.
        page_tokens: above 1, pages of so many tokens are kept or dropped as one.
        page_scores: what a page is worth: the bounds of its keys (Quest), or its best token.
        candidate_factor: above 0, the pages hold so many budgets of candidates among which exact scores choose.
        coverage: below 1, a list ends where it holds this share of the merged attention.
        sink_tokens: first tokens, forced.
        recent_tokens: last tokens, forced.
    """

    budget_tokens: int = 2048
    dense_layers: int = 2
    choose_every_layers: int = 1
    choosing_layers: tuple[int, ...] = ()
    sparse_layers: tuple[int, ...] = ()
    reads_own_list: bool = True
    choose_every_steps: int = 1
    merge: Literal["max", "mean", "raw_max", "none"] = "max"
    page_tokens: int = 1
    page_scores: Literal["bounds", "exact"] = "bounds"
    candidate_factor: int = 0
    coverage: float = 1.0
    sink_tokens: int = 16
    recent_tokens: int = 64

    def chooses(self, layer: int) -> bool:
        """Whether a layer chooses a list."""
        if self.choosing_layers:
            return layer in self.choosing_layers
        return layer >= self.dense_layers and (layer - self.dense_layers) % self.choose_every_layers == 0

    def reads_list(self, layer: int) -> bool:
        """Whether a layer reads a list, its own or an earlier layer's."""
        first = self.choosing_layers[0] if self.choosing_layers else self.dense_layers
        if layer < first or (self.sparse_layers and layer not in self.sparse_layers):
            return False
        return self.reads_own_list or not self.chooses(layer)


@dataclass
class RuleLists:
    """A rule's lists, and what they keep.

    Attributes:
        rule: which tokens they hold.
        kept: of each layer that reads lists, the mass kept, float ``[kv_heads, group, steps]``.
        read: likewise, the share of tokens read: ``[kv_heads, group or 1, steps]``.
    """

    rule: Rule
    kept: list[torch.Tensor] = field(default_factory=list)
    read: list[torch.Tensor] = field(default_factory=list)
    _listed: torch.Tensor = field(default_factory=lambda: torch.empty(0))

    def listed(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, scores: torch.Tensor, scale: float
    ) -> torch.Tensor | None:
        """As of `Lists`."""
        if self.rule.chooses(layer):
            self._listed = choose(self.rule, query, key, scores, scale)
        if not self.rule.reads_list(layer):
            return None
        self.kept.append((scores.softmax(3) * self._listed).sum(3))
        self.read.append(self._listed.sum(3) / scores.isfinite().sum(3)[:, :1])
        return self._listed


def choose(rule: Rule, query: torch.Tensor, key: torch.Tensor, scores: torch.Tensor, scale: float) -> torch.Tensor:
    """The lists of a layer.

    Args:
        rule: by which.
        query: ``[kv_heads, group, steps, head_size]``, rotary positions applied.
        key: ``[kv_heads, tokens, head_size]``, likewise.
        scores: float32 ``[kv_heads, group, steps, tokens]``, minus infinity beyond a step's own token.
        scale: softmax scale.

    Returns:
        bool ``[kv_heads, group or 1, steps, tokens]``.
    """
    tokens, steps = key.shape[1], query.shape[2]
    positions = torch.arange(tokens, device=key.device)
    ends = positions[-steps:].unsqueeze(1)
    reach = positions <= ends
    forced = reach & ((positions < rule.sink_tokens) | (positions > ends - max(rule.recent_tokens, 1)))
    ranking = merged(scores, rule.merge)
    if rule.page_tokens > 1:
        if rule.page_scores == "bounds":
            pages = merged(page_bounds(query, key, rule.page_tokens) * scale, rule.merge)
        else:
            padded = torch.nn.functional.pad(ranking, (0, -tokens % rule.page_tokens), value=-torch.inf)
            pages = padded.view(*padded.shape[:3], -1, rule.page_tokens).amax(4)
        of_tokens = pages.repeat_interleave(rule.page_tokens, 3)[..., :tokens]
        factor = max(rule.candidate_factor, 1)
        candidates = best(of_tokens.masked_fill(~reach, -torch.inf), forced, rule.budget_tokens * factor) & reach
        if rule.candidate_factor == 0:
            return aged(candidates, forced, rule.choose_every_steps)
        ranking = ranking.masked_fill(~candidates, -torch.inf)
    listed = best(ranking, forced, rule.budget_tokens) & reach & (ranking > -torch.inf)
    if rule.coverage < 1:
        mass = ranking.exp() if rule.merge == "mean" else merged(scores, "mean").exp()
        order = ranking.masked_fill(forced, torch.inf).argsort(3, descending=True)
        ordered = mass.gather(3, order)
        before = ordered.cumsum(3) - ordered
        covering = torch.zeros_like(listed).scatter_(3, order, before < rule.coverage)
        listed &= covering | forced
    return aged(listed, forced, rule.choose_every_steps)


def merged(scores: torch.Tensor, merge: str) -> torch.Tensor:
    """What a list's tokens are ranked by: ``[kv_heads, group or 1, ...]`` of ``[kv_heads, group, ...]``."""
    if merge == "raw_max":
        return scores.amax(1, keepdim=True)
    logarithms = scores.log_softmax(3)
    if merge == "max":
        return logarithms.amax(1, keepdim=True)
    if merge == "mean":
        return logarithms.exp().mean(1, keepdim=True).log()
    return logarithms


def page_bounds(query: torch.Tensor, key: torch.Tensor, page_tokens: int) -> torch.Tensor:
    """The largest product that each page's numbers allow (Quest): ``[kv_heads, group, steps, pages]``."""
    short = -key.shape[1] % page_tokens
    padded = torch.cat([key, key[:, -1:].expand(-1, short, -1)], 1).float()
    padded = padded.view(len(key), -1, page_tokens, key.shape[2])
    least, largest = (edge.transpose(1, 2).unsqueeze(1) for edge in (padded.amin(2), padded.amax(2)))
    bounds: torch.Tensor = query.float().clamp(min=0) @ largest + query.float().clamp(max=0) @ least
    return bounds


def best(ranking: torch.Tensor, forced: torch.Tensor, count: int) -> torch.Tensor:
    """The forced tokens and the best others, `count` together."""
    kept = ranking.masked_fill(forced, torch.inf).topk(min(count, ranking.shape[3]), 3).indices
    return torch.zeros_like(ranking, dtype=torch.bool).scatter_(3, kept, True)


def aged(listed: torch.Tensor, forced: torch.Tensor, steps: int) -> torch.Tensor:
    """Lists as they are where only every so many steps choose one; tokens that join stay until the next choice."""
    if steps == 1:
        return listed
    chosen = torch.arange(listed.shape[2], device=listed.device) // steps * steps
    return listed[:, :, chosen] | forced


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="name or folder, as transformers loads it")
    parser.add_argument("--tokens", type=int, default=8192, help="of prompt and answer (default %(default)s)")
    parser.add_argument("--prompts", type=int, default=16, help="of all kinds in turn (default %(default)s)")
    parser.add_argument("--rule", action="append", required=True, help="NAME=JSON of `Rule`; repeatable")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=20261129, help="of the prompts (default %(default)s)")
    parser.add_argument("--keep", type=Path, help="folder of prefilled prompts, written once and read again")
    given = parser.parse_args()
    rules = {
        name: TypeAdapter(Rule).validate_json(text) for name, _, text in (rule.partition("=") for rule in given.rule)
    }
    decoder = Decoder(given.model, given.device)
    answered = list(prefixes(decoder, given))
    dense = statistics.fmean(_score(decoder, task, prefix.said) for task, prefix in answered)
    print(f"dense: score {dense:.3f}\n")
    print(
        "| rule | score | same | KL | read | kept | least kept |", "|---|---|---|---|---|---|---|", sep="\n", flush=True
    )
    for name, rule in rules.items():
        print(row(name, rule, decoder, answered), flush=True)


def row(name: str, rule: Rule, decoder: Decoder, answered: Sequence[tuple[Task, Prefix]]) -> str:
    """What a rule did over all prompts, as a row of the Markdown table."""
    told, scores, read, kept = [], [], [], []
    for task, prefix in answered:
        lists = RuleLists(rule)
        told.append(decoder.tell(prefix, lists))
        scores.append(_score(decoder, task, [prefix.said[0], *told[-1].picks]))
        read.append(float(torch.cat([each.flatten() for each in lists.read]).mean()))
        kept.append(torch.stack([each.mean(2).flatten() for each in lists.kept]))
    of_heads = torch.stack(kept).mean(0)
    numbers = (
        f"{statistics.fmean(scores):.3f}",
        f"{statistics.fmean(one.same for one in told):.3f}",
        f"{statistics.fmean(one.divergence for one in told):.4f}",
        f"{statistics.fmean(read):.3f}",
        f"{float(of_heads.mean()):.3f}",
        f"{float(of_heads.min()):.3f}",
    )
    return f"| {name} | {' | '.join(numbers)} |"


def _score(decoder: Decoder, task: Task, said: Sequence[int]) -> float:
    return score(task, decoder.tokenizer.decode(said, skip_special_tokens=True))


def prefixes(decoder: Decoder, given: argparse.Namespace) -> Iterator[tuple[Task, Prefix]]:
    """Tasks and their prefilled prompts, from the folder where they are kept."""
    prompts: list[TaskPrompt] | None = None
    for number in range(given.prompts):
        path = given.keep and given.keep / f"{Path(given.model).name}-{given.tokens}-{given.seed}-{number}.pt"
        if path and path.exists():
            yield torch.load(path, given.device, weights_only=False)
            continue
        if prompts is None:
            prompts = task_prompts(given.model, TASK_KINDS, given.tokens, given.prompts, given.seed)
        task = prompts[number].task
        kept = task, decoder.prefill(prompts[number].tokens, task.answer_tokens)
        if path:
            torch.save(kept, path)
        yield kept


if __name__ == "__main__":
    main()
