"""A LoRA folder as the peft library writes it → the factors of the weights that it adapts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from pa_fast.checkpoint.safetensors import (
    FLOATS,
    Header,
    TensorInfo,
    WeightFile,
    quoted,
    read_header,
)
from pa_fast.delta.entry import Factors
from pa_fast.delta.lora import CONFIG, PREFIX, WEIGHTS, Layer, layers
from pa_fast.delta.lora_scaling import Scaling
from pa_fast.errors import CheckpointError, DataError, PairError

_AGAIN = "the adapter is damaged or is for another model: save it again with peft"
_MERGED = (
    "merge the adapter with peft (merge_and_unload) and give the merged model as the instruct side"
)
_COPY = ".base_layer.weight"


def read(folder: str | Path, model: torch.nn.Module) -> dict[str, Factors]:
    """First name of each weight that the adapter changes → U [M, R] and V [R, N] with W = B + UV.

    Args:
        folder: `adapter_config.json` and `adapter_model.safetensors`. Which layers are adapted is
            what the latter holds.
        model: of the architecture that the adapter is for, with the weights of the base: the file
            may hold copies of embeddings, which must be those. It may be on the meta device if
            there are none.

    Numerics: alpha / r (or alpha / √r) is multiplied into U, which keeps its dtype where that is
        exact, as for a power of two; else both factors become fp32, and U is rounded once.
    Cost: reads the weight file once.

    Raises:
        CheckpointError: a file is missing or damaged, or the adapter is no plain LoRA.
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
        found = {
            layer: _folded(layer, weights, pair, scaling.of(layer.path)[1])
            for layer, pair in pairs.items()
        }
    finally:
        weights.close()
    return _by_weight(path, found, known)


def _pairs(
    header: Header, known: Mapping[str, Layer], scaling: Scaling
) -> dict[Layer, tuple[TensorInfo, TensorInfo]]:
    """A and B of each adapted layer, as far as the header proves them right."""
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
                found = (
                    f"is {info.dtype} {list(info.shape)}, expected {', '.join(sorted(FLOATS))}"
                    f" {list(shape)}"
                )
                raise PairError(f"{header.file}: tensor {quoted(info.name)} {found}", _AGAIN)
        pairs[layer] = (a, b)
    if not pairs:
        raise CheckpointError(f"{header.file}: adapts no layer", _AGAIN)
    return pairs


def _copied(key: str) -> str | None:
    """The layer whose own weight the tensor `key` is a copy of: peft saves it where an embedding is
    adapted."""
    return key[len(PREFIX) : -len(_COPY)] if key.endswith(_COPY) else None


def _check_copies(
    header: Header, weights: WeightFile, known: Mapping[str, Layer], model: torch.nn.Module
) -> None:
    """Raise PairError unless every copy of a layer's weight is the base's own."""
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
    path: Path, found: Mapping[Layer, Factors], known: Mapping[str, Layer]
) -> dict[str, Factors]:
    """One entry for each weight, if all layers that use it say the same."""
    made: dict[str, Factors] = {}
    for layer, factors in found.items():
        for twin in known.values():
            if twin.weight != layer.weight:
                continue
            other = found.get(twin)
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
        made[layer.weight] = factors
    return made
