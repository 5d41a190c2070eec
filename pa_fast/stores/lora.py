"""LoRA folders of the peft library: the factors of a delta, read from one and written to one.

Names and transpositions of the factors beside a weight [M, N] in peft, layer by layer:

    linear      LAYER.lora_A.weight [R, N] = V      LAYER.lora_B.weight [M, R] = U
    embedding   LAYER.lora_embedding_A [R, M] = Uᵀ  LAYER.lora_embedding_B [N, R] = Vᵀ

with the prefix `base_model.model.`. Every layer has factors of its own: a tied weight has them
twice.

Source: https://github.com/huggingface/peft, src/peft/tuners/lora/layer.py.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from pa_fast.base import Lambda
from pa_fast.checkpoint.layout import ShardPlan, plan_shards
from pa_fast.checkpoint.safetensors import (
    FLOATS,
    Header,
    TensorInfo,
    WeightFile,
    quoted,
    read_header,
    torch_dtype,
)
from pa_fast.checkpoint.writer import OutputFolder
from pa_fast.errors import CheckpointError, DataError, PairError
from pa_fast.stores.file import DeltaFile
from pa_fast.stores.lora_config import Scaling
from pa_fast.stores.lowrank import Factors
from pa_fast.stores.sparse import unchanged
from pa_fast.stores.store import Entry, Source, Store

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
_AGAIN = "the adapter is damaged or is for another model: save it again with peft"
_MERGED = (
    "merge the adapter with peft (merge_and_unload) and give the merged model as the instruct side"
)
_COPY = ".base_layer.weight"


@dataclass(frozen=True)
class Layer:
    """A layer that can be adapted.

    Attributes:
        path: of the module in the model.
        weight: the first name of its weight, which other layers may share.
        shape: [M, N] of that weight.
        embedding: whether it is an embedding; else it is linear.
    """

    path: str
    weight: str
    shape: tuple[int, int]
    embedding: bool

    @property
    def keys(self) -> tuple[str, str]:
        """The names of A and B in the weight file."""
        a, b = (
            ("lora_embedding_A", "lora_embedding_B")
            if self.embedding
            else ("lora_A.weight", "lora_B.weight")
        )
        return f"{PREFIX}{self.path}.{a}", f"{PREFIX}{self.path}.{b}"

    def shapes(self, rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return the shapes of A and B."""
        height, width = self.shape
        return (
            ((rank, height), (width, rank)) if self.embedding else ((rank, width), (height, rank))
        )

    def adapter(self, factors: Factors) -> tuple[torch.Tensor, torch.Tensor]:
        """Return A and B; possibly the factors themselves."""
        u, v = factors.u, factors.v
        return (u.T.contiguous(), v.T.contiguous()) if self.embedding else (v, u)

    def factors(self, a: torch.Tensor, b: torch.Tensor) -> Factors:
        """Return the factors; possibly A and B themselves."""
        return Factors(a.T.contiguous(), b.T.contiguous()) if self.embedding else Factors(b, a)


def layers(model: torch.nn.Module) -> dict[str, Layer]:
    """Return the layers that can be adapted, by path: plain linear and embedding layers whose
    weight has no other users.

    Args:
        model: may be on the meta device.
    """
    users: dict[int, list[str]] = {}
    weights = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in weights.items():
        users.setdefault(id(parameter), []).append(name)
    adaptable = {}
    for names in users.values():
        modules = {name: model.get_submodule(name.rpartition(".")[0]) for name in names}
        if all(name.endswith(".weight") and _is_plain(module) for name, module in modules.items()):
            height, width = weights[names[0]].shape
            for name, module in modules.items():
                path = name.removesuffix(".weight")
                adaptable[path] = Layer(
                    path, names[0], (height, width), type(module) is torch.nn.Embedding
                )
    return adaptable


def _is_plain(module: torch.nn.Module) -> bool:
    # subclasses may scale or gate their output: the delta of their weight is then not that of the
    # output
    return type(module) is torch.nn.Linear or (
        type(module) is torch.nn.Embedding and module.max_norm is None
    )


@dataclass(eq=False)
class LoraStore(Store):
    """The store of a delta that is given by its factors, as an adapter is: W(λ) = B + λUV for the
    weights in `adapted`, and B for all others, whatever the instruct side holds.

    The adapted model is the instruct model, so nothing of the delta is lost. The base is given as
    both sides.

    Args:
        adapted: first name of a weight → U [M, R] and V [R, N]; see `read`.
    """

    adapted: Mapping[str, Factors]

    name = "lowrank"
    exact = False

    def describe(self) -> str:
        """Return all options in one line."""
        ranks = [factors.u.shape[-1] for factors in self.adapted.values()]
        return f"{self.name}, adapter of {len(ranks)} weights, rank {max(ranks, default=0)}"

    def encode(self, sources: Sequence[Source]) -> Iterator[Entry]:
        """Yield the entry of each source, in order and one at a time.

        Raises:
            PairError: factors of a weight that is not a source, or of another shape.
        """
        missing = self.adapted.keys() - {source.name for source in sources}
        if missing:
            raise PairError(
                f"the adapter changes `{min(missing)}`, which is not live",
                "give the base that it was trained on",
            )
        for source in sources:
            factors = self.adapted.get(source.name)
            if factors is None:
                yield unchanged(source.base.to(source.device))
                continue
            u, v = factors.u, factors.v
            if (u.shape[0], v.shape[1]) != source.base.shape:
                shapes = f"{[u.shape[0], v.shape[1]]}, the base has {list(source.base.shape)}"
                raise PairError(
                    f"the adapter's `{source.name}` is {shapes}",
                    "give the base that it was trained on",
                )
            yield Factors(u.to(source.device).contiguous(), v.to(source.device).contiguous())


def read(folder: str | Path, model: torch.nn.Module) -> dict[str, Factors]:
    """Read first name of each weight that the adapter changes → U [M, R] and V [R, N] with W = B +
    UV.

    Args:
        folder: holds `adapter_config.json` and `adapter_model.safetensors`. The latter decides
            which layers are adapted.
        model: of the architecture that the adapter is for, with the weights of the base: copies of
            embeddings in the file must equal them. It may be on the meta device if there are no
            copies.

    Numerics: alpha / r (or alpha / √r) is multiplied into U, which keeps its dtype if that is
        exact, as for a power of two; else both factors become fp32, and U is rounded once.
    Cost: reads the weight file once.

    Raises:
        CheckpointError: a file is missing or damaged, or the adapter is not a plain LoRA.
        PairError: the adapter is for another model, or treats the layers of one tied weight
            differently.
        DataError: factors that are not finite.
    """
    folder = Path(folder)
    scaling = Scaling.read(folder / CONFIG)
    path = folder / WEIGHTS
    if not path.exists() and (folder / "adapter_model.bin").exists():
        raise CheckpointError(
            f"{path}: missing, there is only adapter_model.bin",
            "save it again as safetensors; a pickle runs code",
        )
    header = read_header(path)
    known = layers(model)
    pairs = _pairs(header, known, scaling)
    weights = WeightFile(path, header.size_bytes)
    try:
        _check_copies(header, weights, known, model)
        adapted = {
            layer: _folded(layer, weights, pair, scaling.of(layer.path)[1])
            for layer, pair in pairs.items()
        }
    finally:
        weights.close()
    return _by_weight(path, adapted, known)


def _pairs(
    header: Header, known: Mapping[str, Layer], scaling: Scaling
) -> dict[Layer, tuple[TensorInfo, TensorInfo]]:
    """Return A and B of each adapted layer, as far as the header allows to check them."""
    owners = {key: layer for layer in known.values() for key in layer.keys}
    for key in header.tensors:
        if key not in owners and not (key.startswith(PREFIX) and _copied(key) in known):
            lora = ".lora_A." in key or ".lora_B." in key or ".lora_embedding_" in key
            kind = (
                "the model has no linear or embedding layer for it"
                if lora
                else "no factor of a plain LoRA"
            )
            raise PairError(
                f"{header.file}: tensor {quoted(key)}: {kind}", _AGAIN if lora else _MERGED
            )
    pairs = {}
    for layer in dict.fromkeys(owners[key] for key in header.tensors if key in owners):
        missing = [key for key in layer.keys if key not in header.tensors]
        if missing:
            raise CheckpointError(
                f"{header.file}: tensor {quoted(missing[0])} is missing beside its other half",
                _AGAIN,
            )
        a, b = (header.tensors[key] for key in layer.keys)
        for info, shape in zip((a, b), layer.shapes(scaling.of(layer.path)[0])):
            if info.dtype not in FLOATS or info.shape != shape:
                raise PairError(
                    f"{header.file}: tensor {quoted(info.name)} is {info.dtype}"
                    f" {list(info.shape)}, expected {', '.join(sorted(FLOATS))} {list(shape)}",
                    _AGAIN,
                )
        pairs[layer] = (a, b)
    if not pairs:
        raise CheckpointError(f"{header.file}: adapts no layer", _AGAIN)
    return pairs


def _copied(key: str) -> str | None:
    """Return the layer whose own weight the tensor `key` is a copy of. peft saves such copies of
    adapted embeddings."""
    return key[len(PREFIX) : -len(_COPY)] if key.endswith(_COPY) else None


def _check_copies(
    header: Header, weights: WeightFile, known: Mapping[str, Layer], model: torch.nn.Module
) -> None:
    """Raise PairError unless every copy of a layer's weight equals the base's."""
    for key, info in header.tensors.items():
        path = _copied(key)
        if path not in known or path is None:
            continue
        own = model.get_parameter(f"{path}.weight")
        if own.is_meta:
            raise PairError(
                f"{header.file}: tensor {quoted(key)} cannot be compared",
                "give the model with the base's weights",
            )
        if info.shape != tuple(own.shape) or not torch.equal(
            _tensor(weights, info).to(own.dtype), own.cpu()
        ):
            raise PairError(
                f"{header.file}: tensor {quoted(key)} is not the base's, so the base was"
                " trained too",
                _MERGED,
            )


def _folded(
    layer: Layer, weights: WeightFile, pair: tuple[TensorInfo, TensorInfo], scale: float
) -> Factors:
    read = [_tensor(weights, info) for info in pair]
    for info, tensor in zip(pair, read):
        if not bool(torch.isfinite(tensor).all()):
            raise DataError(
                f"{weights.path}: tensor {quoted(info.name)} has weights that are not finite",
                "such an adapter is broken",
            )
    factors = layer.factors(*read)
    u = factors.u.float() * scale
    if not bool(torch.isfinite(u).all()):
        raise DataError(
            f"{weights.path}: tensor {quoted(pair[1].name)} times {scale:g} is not finite",
            "such an adapter is broken",
        )
    narrow = factors.u.dtype == factors.v.dtype and torch.equal(u.to(factors.u.dtype).float(), u)
    dtype = factors.u.dtype if narrow else torch.float32
    return Factors(u.to(dtype), factors.v.to(dtype))


def _tensor(weights: WeightFile, info: TensorInfo) -> torch.Tensor:
    return weights.elements(info, 0, info.count).view(info.shape)


def _by_weight(
    path: Path, adapted: Mapping[Layer, Factors], known: Mapping[str, Layer]
) -> dict[str, Factors]:
    """Return one entry for each weight, if all layers that use it have the same factors."""
    by_weight: dict[str, Factors] = {}
    for layer, factors in adapted.items():
        for twin in known.values():
            if twin.weight != layer.weight:
                continue
            other = adapted.get(twin)
            if other is None or not (
                torch.equal(other.u, factors.u) and torch.equal(other.v, factors.v)
            ):
                does = "does not adapt" if other is None else "adapts differently"
                raise PairError(
                    f"{path}: adapts {quoted(layer.path)}, and {does} {quoted(twin.path)}, which"
                    " has the same weight",
                    "untie the two in the base model first, and save it with"
                    " tie_word_embeddings=False",
                )
        by_weight[layer.weight] = factors
    return by_weight


@dataclass(frozen=True)
class Exported:
    """Result of an export.

    Attributes:
        ranks: path of each adapted layer → rank.
        left_out: names of tensors that the delta changes and a LoRA cannot; the adapter leaves them
            as in the base.
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
            are read: it may be on the meta device.
        folder: new or empty.
        base_model: the folder or hub id that the adapter names as its base.
        partial: leave out and report tensors that do not fit, instead of refusing.

    Numerics: the factors as they are; W(λ) = B + λUV as the library computes it, with other
    rounding than a merge.

    Raises:
        UsageError: λ is not a finite number.
        CheckpointError: the file is not a delta, or is damaged.
        PairError: the delta is for another model.
        DataError: the delta changes what a LoRA cannot hold, or there is nothing to export.
        OutputError: the folder is not empty, or cannot be written.
    """
    scale = float(Lambda(lam))
    with DeltaFile.open(delta) as file:
        _check_model(file, model)
        adapted, unfit = _fitting(file, layers(model))
        if not adapted:
            raise DataError(
                f"{file.path}: nothing in it fits into a LoRA",
                'encode the pair with --format lowrank (format="lowrank")',
            )
        if unfit and not partial:
            raise DataError(
                f"{file.path}: changes {len(unfit)} tensors that a LoRA cannot hold, such as"
                f" {quoted(unfit[0])}",
                "export the rest with --partial (partial=True), or merge the model instead",
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
    return Exported(ranks, tuple(unfit))


def _check_model(file: DeltaFile, model: torch.nn.Module) -> None:
    """Raise PairError unless the model has every tensor of the delta, in its shape."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name, tensor in file.description.tensors.items():
        if shapes.get(name) != tensor.shape:
            has = f"has {list(shapes[name])}" if name in shapes else "has no such tensor"
            raise PairError(
                f"{file.path}: a delta of {quoted(name)} {list(tensor.shape)}, the model {has}",
                "give a model of the base's config.json",
            )


def _fitting(file: DeltaFile, known: Mapping[str, Layer]) -> tuple[dict[Layer, Factors], list[str]]:
    """Return the factors of each layer, and the names of changed tensors that no layer can take."""
    adapted: dict[Layer, Factors] = {}
    unfit = []
    for name, tensor in file.description.tensors.items():
        entry = file.entry(name) if tensor.kind == "factors" else None
        rank = entry.u.shape[-1] if isinstance(entry, Factors) else None
        if rank == 0 or (
            tensor.endpoint_sums[1] is not None
            and tensor.endpoint_sums[0] == tensor.endpoint_sums[1]
        ):
            continue  # the same at every λ
        users = _users(name, file, known)
        if not isinstance(entry, Factors) or not users:
            unfit.append(name)
        adapted.update({user: entry for user in users if isinstance(entry, Factors)})
    return adapted, unfit


def _users(name: str, file: DeltaFile, known: Mapping[str, Layer]) -> list[Layer]:
    """Return the layers whose weight is the tensor `name`. A tied layer that the delta treats
    separately has a name of its own."""
    layer = known.get(name.removesuffix(".weight"))
    if layer is None or not name.endswith(".weight"):
        return []
    twins = (other for other in known.values() if other.weight == layer.weight)
    return [
        twin
        for twin in twins
        if twin == layer or f"{twin.path}.weight" not in file.description.tensors
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
