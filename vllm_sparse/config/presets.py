"""Presets: methods and knobs of both phases by the prompt's length, under one name.

This file is data. What a preset holds is what was measured on real checkpoints (docs/methods.md, "What real answers
lose"); when a measurement says otherwise, it changes here and nowhere else. `config.request` resolves it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vllm_sparse.config.names import DENSE, PHASES


@dataclass(frozen=True)
class Choice:
    """What a tier runs in one phase.

    Attributes:
        method: its name, or ``dense``.
        knobs: of the method, without its name before them; they win over the server's configuration, so that a preset
            is what was measured.
    """

    method: str = DENSE
    knobs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Tier:
    """What prompts of a length run.

    Attributes:
        from_tokens: least tokens of the prompt; the tier ends where the next one begins.
        prefill: choice for the prompt.
        decode: choice for the generation, however long it becomes.
    """

    from_tokens: int
    prefill: Choice = field(default_factory=Choice)
    decode: Choice = field(default_factory=Choice)

    def choice(self, phase: str) -> Choice:
        """What it runs in a phase, ``prefill`` or ``decode``."""
        return {"prefill": self.prefill, "decode": self.decode}[phase]

    def extras(self) -> dict[str, Any]:
        """The sampling extras that ask for the same without a preset."""
        extras: dict[str, Any] = {}
        for phase in PHASES:
            choice = self.choice(phase)
            extras[f"sparse_{phase}"] = choice.method
            extras |= {f"{choice.method}_{knob}": value for knob, value in choice.knobs.items()}
        return extras


@dataclass(frozen=True)
class Preset:
    """Tiers under a name. Prompts shorter than the first tier run dense.

    Attributes:
        description: what it is for.
        quality: what was measured of it, and on what.
        tiers: with rising lengths.
    """

    description: str
    quality: str
    tiers: tuple[Tier, ...]

    def methods(self, phase: str) -> list[str]:
        """Methods that its tiers run in a phase, each once, without dense."""
        used = dict.fromkeys(tier.choice(phase).method for tier in self.tiers)
        return [method for method in used if method != DENSE]


# Shorter prompts gain nothing: in the whole engine sparse prefill was slower than dense at 8K.
_PAYS_FROM_TOKENS = 16384
# Choosing in each layer pays in batches from here on, for one request from about 40K.
_DECODE_PAYS_FROM_TOKENS = 32768

# Lists of dhsa end where they hold a share of the candidates' attention, so heads that need less read less.
_DHSA = {"bound_weight": 0.5, "candidate_factor": 3.0}
_DHSA_QUALITY = Choice("dhsa", {"density": 0.75, "coverage": 0.983, **_DHSA})
_DHSA_BALANCED = Choice("dhsa", {"density": 0.5, "coverage": 0.975, **_DHSA})
_DHSA_FAST = Choice("dhsa", {"density": 0.5, "coverage": 0.957, **_DHSA})
_TOKENTOPK = Choice("tokentopk", {"budget_tokens": 2048, "dense_layers": 0})
# Lists of as many pages, found by the sum over their keys: lists of equal density keep as much either way.
_MEASURED_ON = "Qwen2.5-Coder-0.5B at 32K, lists as long as these"

PRESETS: dict[str, Preset] = {
    "quality": Preset(
        "No loss was found: prompts by dhsa with wide lists, generations dense.",
        f"{_MEASURED_ON}, 912 prompts: score +0.001 ± 0.012, density 0.26; -log p of four texts of 8K -0.011.",
        (Tier(_PAYS_FROM_TOKENS, prefill=_DHSA_QUALITY),),
    ),
    "balanced": Preset(
        "No loss beyond chance was found in either phase: prompts by dhsa at its defaults, from 32K on generations by "
        "tokentopk.",
        f"{_MEASURED_ON}: prompts, 912 of them, score -0.007 ± 0.013, -log p -0.005, density 0.21; generations, 480 "
        "prompts, -0.005 ± 0.011, KL 0.0006; both together, 456 prompts, -0.001 ± 0.019.",
        (
            Tier(_PAYS_FROM_TOKENS, prefill=_DHSA_BALANCED),
            Tier(_DECODE_PAYS_FROM_TOKENS, prefill=_DHSA_BALANCED, decode=_TOKENTOPK),
        ),
    ),
    "fast": Preset(
        "Loses a little for speed: prompts by dhsa with shorter lists, generations from 32K on by tokentopk.",
        f"{_MEASURED_ON}: prompts, 912 of them, score -0.008 ± 0.015, density 0.17, -log p of four texts of 8K -0.023; "
        "generations, 480 prompts, -0.005 ± 0.011, KL 0.0006; both together not done.",
        (
            Tier(_PAYS_FROM_TOKENS, prefill=_DHSA_FAST),
            Tier(_DECODE_PAYS_FROM_TOKENS, prefill=_DHSA_FAST, decode=_TOKENTOPK),
        ),
    ),
}
