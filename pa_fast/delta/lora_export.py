"""A low-rank delta file → a LoRA folder that the peft library loads."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from pa_fast.base import Lambda
from pa_fast.checkpoint.layout import ShardPlan, plan_shards
from pa_fast.checkpoint.safetensors import FLOATS, quoted, torch_dtype
from pa_fast.checkpoint.writer import OutputFolder
from pa_fast.delta.entry import Factors
from pa_fast.delta.file import DeltaFile
from pa_fast.delta.lora import CONFIG, WEIGHTS, Layer, layers
from pa_fast.errors import DataError, PairError


@dataclass(frozen=True)
class Exported:
    """What became of a delta.

    Attributes:
        ranks: path of each adapted layer → rank.
        left_out: names of tensors that the delta changes and a LoRA cannot; the adapter leaves them
            at the base.
    """

    ranks: Mapping[str, int]
    left_out: tuple[str, ...]


def export(
    delta: str | Path,
    model: torch.nn.Module,
    folder: str | Path,
    lam: float = 1.0,
    *,
    base_model: str = "",
    partial: bool = False,
) -> Exported:
    """Write the LoRA folder `folder` that makes W(λ) of the base: `lora_alpha` is λ times the rank.

    Args:
        delta: a delta file; of its tensors only matrices of linear and embedding layers, held as
            factors, fit into a LoRA.
        model: of the architecture that the delta is for. Only names, shapes, and kinds of layers
            are looked at: it may be on the meta device.
        folder: new or empty.
        base_model: the folder or hub id that the adapter names as its base.
        partial: leave out what does not fit, and say so, instead of refusing.

    Numerics: the factors as they are; W(λ) = B + λUV as the library computes it, which rounds
    otherwise than a merge.

    Raises:
        UsageError: λ is not a finite number.
        CheckpointError: the file is no delta, or is damaged.
        PairError: the delta is for another model.
        DataError: the delta changes what a LoRA cannot hold, or there is nothing to export.
        OutputError: the folder is not empty, or cannot be written.
    """
    scale = float(Lambda(lam))
    with DeltaFile.open(delta) as file:
        _check_model(file, model)
        adapted, left = _fitting(file, layers(model))
        if left and not partial:
            raise DataError(
                f"{file.path}: changes {len(left)} tensors that a LoRA cannot hold, such as"
                f" {quoted(left[0])}",
                "export the rest with --partial (partial=True), or merge the model instead",
            )
        if not adapted:
            raise DataError(
                f"{file.path}: nothing in it fits into a LoRA",
                "encode the pair with the store `lowrank`",
            )
        ranks = {layer.path: factors.u.shape[-1] for layer, factors in adapted.items()}
        plan = _plan(adapted)
        with OutputFolder(folder, plan.size_bytes, sources=[file.path]) as out:
            with out.shard(plan) as shard:
                for layer, factors in adapted.items():
                    for key, tensor in zip(layer.keys, layer.adapter(factors)):
                        shard.write(key, 0, tensor.contiguous())
            out.write(
                CONFIG, (json.dumps(_config(ranks, scale, base_model), indent=2) + "\n").encode()
            )
            out.commit()
    return Exported(ranks, tuple(left))


def _check_model(file: DeltaFile, model: torch.nn.Module) -> None:
    """Raise PairError unless the model has every tensor of the delta, in its shape."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name, about in file.about.tensors.items():
        if shapes.get(name) != about.shape:
            found = f"has {list(shapes[name])}" if name in shapes else "has no such tensor"
            raise PairError(
                f"{file.path}: a delta of {quoted(name)} {list(about.shape)}, the model {found}",
                "give a model of the base's config.json",
            )


def _fitting(file: DeltaFile, known: Mapping[str, Layer]) -> tuple[dict[Layer, Factors], list[str]]:
    """The factors of each layer, and the names of changed tensors that no layer can take."""
    adapted: dict[Layer, Factors] = {}
    left = []
    for name, about in file.about.tensors.items():
        entry = file.entry(name) if about.kind == "factors" else None
        rank = entry.u.shape[-1] if isinstance(entry, Factors) else None
        if rank == 0 or (about.ends[1] is not None and about.ends[0] == about.ends[1]):
            continue  # the same at every λ
        users = _users(name, file, known)
        if not isinstance(entry, Factors) or not users:
            left.append(name)
        adapted.update({user: entry for user in users if isinstance(entry, Factors)})
    return adapted, left


def _users(name: str, file: DeltaFile, known: Mapping[str, Layer]) -> list[Layer]:
    """The layers whose weight is the tensor `name`. A tied one that the delta tells apart has a
    name of its own."""
    layer = known.get(name.removesuffix(".weight"))
    if layer is None or not name.endswith(".weight"):
        return []
    twins = (other for other in known.values() if other.weight == layer.weight)
    return [
        twin for twin in twins if twin == layer or f"{twin.path}.weight" not in file.about.tensors
    ]


def _plan(adapted: Mapping[Layer, Factors]) -> ShardPlan:
    dtypes = {torch_dtype(name): name for name in FLOATS}
    rows = [
        (key, dtypes[factors.u.dtype], shape, shape[0] * shape[1])
        for layer, factors in adapted.items()
        for key, shape in zip(layer.keys, layer.shapes(factors.u.shape[-1]))
    ]
    (plan,) = plan_shards(rows, sys.maxsize)
    return replace(plan, file=WEIGHTS)


def _config(ranks: Mapping[str, int], lam: float, base_model: str) -> dict[str, object]:
    most = max(ranks.values())
    # keys are regular expressions that may begin at any dot of a path
    others = {f"^{re.escape(path)}": rank for path, rank in ranks.items() if rank != most}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": most,
        "lora_alpha": lam * most,
        "rank_pattern": others,
        "alpha_pattern": {path: lam * rank for path, rank in others.items()},
        "target_modules": sorted(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
    }
