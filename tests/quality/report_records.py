"""Plausible records of a run that never was."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vllm_sparse.quality.records import (
    DENSE,
    DecodingRecord,
    GenerationRecord,
    LanguageRecord,
    RecallRecord,
    Record,
    SpeedRecord,
    TaskRecord,
)
from vllm_sparse.quality.variants import Variant

KINDS = (
    "one_needle",
    "many_keys",
    "several_values",
    "several_keys",
    "key_value",
    "variables",
    "frequent_words",
    "common_words",
    "counting",
    "two_places",
    "copy",
    "conversation",
)
HOSTILE = (
    "</pre></td><script>alert(1)</script><img src=x onerror=alert(2)>",
    '" onmouseover="alert(3)" x="',
    "&lt;script&gt; ]]> <!-- <svg/onload=alert(4)> -->",
    "=cmd|' /C calc'!A0 | a | b |\n\n# heading",
    "\x00\x1b[31m\u202egnp.exe \ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16"),
    "",
)

VARIANTS = (
    Variant("sale", {"sparse_prefill": "sale"}),
    Variant("flexprefill", {"sparse_prefill": "flexprefill"}),
    Variant("tidal", {"sparse_decode": "tidal"}),
    Variant("blocktopk 4096", {"sparse_decode": "blocktopk", "blocktopk_budget_tokens": 4096}),
    Variant("preset quality", {"sparse_preset": "quality"}),
    *(
        Variant(f"{kind} {phase} {density}", {f"sparse_{phase}": kind}, kind)
        for kind in ("random", "streaming", "oracle")
        for phase in ("prefill", "decode")
        for density in (0.1, 0.25, 0.5)
    ),
)


def many_variants(count: int) -> tuple[Variant, ...]:
    """Variants without baselines, every other one sparse in another phase."""
    return tuple(
        Variant(f"method {number}", {f"sparse_{'prefill' if number % 2 else 'decode'}": f"method{number}"})
        for number in range(count)
    )


def loss_of(variant: Variant) -> float:
    """Share of the dense score that a variant loses."""
    if variant.baseline:
        density = float(variant.name.rpartition(" ")[2])
        return {"random": 0.9, "streaming": 0.7, "oracle": 0.05}[variant.baseline] * (1 - density)
    return {"tidal": 0.4, "flexprefill": 0.06}.get(variant.name, 0.0)


def density_of(variant: Variant) -> float:
    """Density of the phases that are sparse."""
    if variant.baseline:
        return float(variant.name.rpartition(" ")[2])
    return {"sale": 0.43, "flexprefill": 0.45, "tidal": 0.18}.get(variant.name, 0.35)


def fake_records(
    rng: np.random.Generator,
    variants: Sequence[Variant] = VARIANTS,
    lengths: Sequence[int] = (8192, 32768),
    kinds: Sequence[str] = KINDS,
    documents: int = 10,
    prompts: int = 4,
    texts: int = 16,
    hostile: bool = True,
) -> list[Record]:
    """Records of every measure, of dense and of all variants."""
    records: list[Record] = []
    all_variants = (Variant(DENSE, {}), *variants)
    for length in lengths:
        for kind_number, kind in enumerate(kinds):
            ability = 0.03 if kind == "counting" and length > 16384 else 0.95 - 0.05 * kind_number
            for document in range(documents):
                for prompt in range(prompts):
                    dense_right = rng.random() < ability
                    depth = None if kind in ("frequent_words", "common_words") else float(rng.random())
                    for variant in all_variants:
                        lost = rng.random() < (loss_of(variant) if variant.name != DENSE else 0)
                        right = dense_right and not lost
                        text = str(rng.choice(HOSTILE)) if hostile and rng.random() < 0.1 else f"said {prompt}"
                        records.append(
                            TaskRecord(
                                variant=variant.name,
                                length_tokens=length,
                                kind=kind,
                                document=document,
                                prompt=prompt,
                                score=float(right),
                                text="4711" if right else text,
                                answers=("4711", HOSTILE[0]) if hostile else ("4711",),
                                prompt_tokens=length - 64,
                                depth=depth,
                                question=f"What is the number of {kind} {prompt}? " + (HOSTILE[1] if hostile else ""),
                            )
                        )
        records += _texts(rng, all_variants, length, texts)
        for variant in all_variants:
            for repeat in range(5):
                dense = 0.1 * length / 8192
                records.append(
                    SpeedRecord(
                        variant=variant.name,
                        length_tokens=length,
                        repeat=repeat,
                        ttft_s=dense * (0.4 + 0.6 * density_of(variant) if variant.sparse_prefill else 1)
                        + float(rng.normal(0, 0.002)),
                        tpot_s=0.01 * (0.5 + 0.5 * density_of(variant) if variant.sparse_decode else 1),
                        prefill_density=density_of(variant) if variant.sparse_prefill else None,
                        decode_density=density_of(variant) if variant.sparse_decode else None,
                    )
                )
    return records


def _texts(rng: np.random.Generator, variants: Sequence[Variant], length: int, texts: int) -> list[Record]:
    records: list[Record] = []
    for number in range(texts):
        kind, document = ("code", "prose")[number % 2], number // 2
        curve = 2.5 - np.linspace(0, 1.2, 16) + rng.normal(0, 0.1, 16)
        for variant in variants:
            loss = loss_of(variant) if variant.name != DENSE else 0.0
            more = np.linspace(0, 0.3, 16) * loss + (rng.normal(0, 0.002, 16) if variant.name != DENSE else 0)
            if variant.sparse_prefill or variant.name == DENSE:
                records.append(
                    LanguageRecord(
                        variant=variant.name,
                        length_tokens=length,
                        kind=kind,
                        document=document,
                        mean_loss=float((curve + more)[8:].mean()),
                        loss_by_position=tuple(map(float, curve + more)),
                    )
                )
            if variant.name != DENSE and variant.sparse_decode:
                divergence = np.abs(rng.normal(0.004 + loss, 0.001, 8))
                records.append(
                    DecodingRecord(
                        variant=variant.name,
                        length_tokens=length,
                        kind=kind,
                        document=document,
                        mean_divergence=float(divergence.mean()),
                        same_first=float(1 - loss / 2 - 0.004 * rng.random()),
                        divergence_by_position=tuple(map(float, divergence)),
                        tokens=512,
                    )
                )
            if number < 6:
                records.append(
                    GenerationRecord(
                        variant=variant.name,
                        length_tokens=length,
                        kind="list of functions",
                        document=number,
                        tokens=int(rng.integers(1000, 4000)),
                        common_prefix_tokens=int(rng.integers(0, 1000)),
                        score=float(np.clip(0.8 - loss + rng.normal(0, 0.05), 0, 1)),
                        score_by_part=tuple(float(np.clip(0.8 - loss * part, 0, 1)) for part in range(4)),
                        text="text",
                        agreement=float(np.clip(0.98 - loss / 2 + rng.normal(0, 0.01), 0, 1)),
                        agreement_by_part=tuple(float(np.clip(0.98 - loss * part / 8, 0, 1)) for part in range(4)),
                        mean_loss=0.05 + loss,
                        repeated=float(rng.random() / 4),
                    )
                )
            if number < 2 and variant.name != DENSE:
                best = np.clip(1 - np.abs(rng.normal(0, 0.05, (24, 14))), 0, 1)
                recall = np.clip(best - np.abs(rng.normal(0, 0.1 + loss / 4, (24, 14))), 0, 1)
                records.append(
                    RecallRecord(
                        variant=variant.name,
                        length_tokens=length,
                        kind=kind,
                        document=document,
                        phase="prefill" if variant.sparse_prefill else "decode",
                        recall=tuple(tuple(map(float, row)) for row in recall),
                        best=tuple(tuple(map(float, row)) for row in best),
                        density=(density_of(variant),) * 24,
                    )
                )
    return records
