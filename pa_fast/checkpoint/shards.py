"""The weight files of a checkpoint folder: found through the index or alone, and every lie of the
index refused."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pa_fast.checkpoint.document import quoted, read_object
from pa_fast.checkpoint.header import Header, read_header
from pa_fast.errors import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
_REDIRECTS = {"transformers_weights": "weights", "configuration_files": "a configuration"}
"""Keys of config.json by which transformers reads other files than those of the standard names, and
what it reads there."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", re.ASCII)
_RESAVE = (
    "python -c \"from transformers import AutoModelForCausalLM as M; M.from_pretrained('{0}',"
    " dtype='auto').save_pretrained('{0}-again')\""
)
_CONVERT = (
    'convert it first: python -c "from transformers import AutoModelForCausalLM as M;'
    " M.from_pretrained('{0}', dtype='auto').save_pretrained('{0}-safetensors')\" and copy the"
    " tokenizer files"
)


def read_shards(folder: Path) -> list[Header]:
    """Headers of all weight files of `folder`, in file order.

    Raises:
        CheckpointError: no weights, weights of another kind, a shard that is missing or damaged, or
            an index that names a file outside the folder or disagrees with its shards.
    """
    single, index = folder / SINGLE, folder / INDEX
    if single.exists() and index.exists():
        named = set(_weight_map(index).values())
        if named != {SINGLE}:
            found = f"both {SINGLE} and {INDEX}, which names {len(named)} other files"
            raise CheckpointError(
                f"{folder}: found {found}, expected one of them", "remove the one that is left over"
            )
    if index.exists() or index.is_symlink():
        return _indexed(folder, _weight_map(index))
    if single.exists() or single.is_symlink():
        return [read_header(single)]
    raise _no_weights(folder)


def check_redirects(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of which transformers would read other weights, or more, than
    `read_shards` finds.

    Raises:
        CheckpointError: a key of config.json names other files, or an adapter lies beside the
            weights.
    """
    for part in (config, *(value for value in config.values() if isinstance(value, Mapping))):
        for key, what in _REDIRECTS.items():
            if part.get(key) is not None:
                found = (
                    f"`{key}` is {quoted(str(part[key]))}, from which transformers would read"
                    f" {what}"
                )
                standard = f"expected {SINGLE} or {INDEX}, and config.json itself"
                hint = f"make those files the standard ones, and remove `{key}` from config.json"
                raise CheckpointError(f"{folder / 'config.json'}: {found}, {standard}", hint)
    if (folder / ADAPTER).exists():
        raise CheckpointError(
            f"{folder / ADAPTER}: found an adapter, which transformers would add to the weights"
            " beside it",
            "merge the adapter into them, or move its files to a folder of their own",
        )


def _weight_map(index: Path) -> dict[str, str]:
    found: Any = read_object(index).get("weight_map")
    if (
        not isinstance(found, dict)
        or not found
        or not all(isinstance(file, str) for file in found.values())
    ):
        raise CheckpointError(
            f"{index}: `weight_map` is not an object of tensor and file names",
            "download the index again",
        )
    for name, file in found.items():
        if (
            "/" in file
            or "\\" in file
            or not file.isprintable()
            or not file.endswith(".safetensors")
        ):
            expected = "expected the plain name of a .safetensors file in the same folder"
            raise CheckpointError(
                f"{index}: tensor {quoted(name)} is in {quoted(file)}, {expected}",
                "do not trust this index",
            )
    return found


def _indexed(folder: Path, weight_map: dict[str, str]) -> list[Header]:
    index = folder / INDEX
    missing = [file for file in sorted(set(weight_map.values())) if not (folder / file).exists()]
    if missing:
        found = (
            f"{len(missing)} of {len(set(weight_map.values()))} shards are missing:"
            f" {', '.join(missing[:3])}"
        )
        raise CheckpointError(f"{folder}: {found}, which {INDEX} names", "complete the download")
    headers = {file: read_header(folder / file) for file in sorted(set(weight_map.values()))}
    for name, file in weight_map.items():
        if name not in headers[file].tensors:
            found = f"tensor {quoted(name)} should be in {file}, which does not hold it"
            raise CheckpointError(
                f"{index}: {found}", "index and shards are of different downloads: fetch both again"
            )
    for file, header in headers.items():
        for name in header.tensors:
            placed = weight_map.get(name)
            if placed is not None and placed != file:
                raise CheckpointError(
                    f"{folder}: tensor {quoted(name)} is in two shards, {placed} and {file};"
                    f" {INDEX} names the first",
                    "loaders differ in which they take: load the folder and save it again"
                    f" ({_RESAVE.format(folder)})",
                )
            if placed is None:
                found = (
                    f"shard {file} holds tensor {quoted(name)}, which the index does not place"
                    " there"
                )
                raise CheckpointError(
                    f"{index}: {found}",
                    "index and shards are of different downloads: fetch both again",
                )
    return list(headers.values())


def cache_snapshots(folder: Path) -> list[Path]:
    """The checkpoints in the cache folder of a hub repository (`models--ORG--NAME`), oldest first;
    none in any other."""
    if not folder.name.startswith("models--"):
        return []
    found = [path for path in (folder / "snapshots").glob("*") if path.is_dir()]
    return sorted(found, key=lambda path: (path.stat().st_mtime_ns, path.name))


def hub_id(folder: Path) -> str | None:
    """The hub id of a checkpoint that lies in a hub cache (`models--ORG--NAME/snapshots/COMMIT`);
    None of any other folder.

    Source: `huggingface_hub`'s cache layout,
    https://huggingface.co/docs/huggingface_hub/guides/manage-cache
    """
    kind, *name = folder.parent.parent.name.split("--")
    found = "/".join(name)
    return (
        found
        if kind == "models" and folder.parent.name == "snapshots" and _HUB_ID.fullmatch(found)
        else None
    )


def _no_weights(folder: Path) -> CheckpointError:
    names = sorted(path.name for path in folder.iterdir())
    if not names:
        return CheckpointError(f"{folder}: the folder is empty", "check the path")
    pickles = [
        name
        for name in names
        if name.endswith((".bin", ".pt", ".pth")) and not name.startswith("training_args")
    ]
    cached = cache_snapshots(folder)
    if cached:
        return CheckpointError(
            f"{folder}: the cache folder of a hub repository, whose checkpoints are in its"
            " snapshots",
            f"give {cached[-1]}, or the hub id {hub_id(cached[-1])}",
        )
    parts = [name for name in names if name.endswith(".safetensors")]
    whole = [name for name in parts if name.startswith("consolidated")]
    if whole and len(whole) == len(parts):
        return CheckpointError(
            f"{folder}: found {', '.join(whole[:3])} alone, the names and layout of the model's own"
            " code, not of transformers",
            f"fetch the repository's model*.safetensors files and {INDEX} as well, or convert it"
            " with transformers' convert_…_weights_to_hf script for this model",
        )
    if ADAPTER in names:
        return CheckpointError(
            f"{folder}: holds an adapter, not a whole model",
            "merge the adapter into its base model first",
        )
    if parts:
        found = f"found {', '.join(parts[:3])} but neither {SINGLE} nor {INDEX}"
        return CheckpointError(
            f"{folder}: {found}",
            "complete the download: without the index a missing shard goes unseen",
        )
    if pickles:
        found = (
            f"weights are pickle files only ({', '.join(pickles[:3])}), which can run code when"
            " loaded"
        )
        return CheckpointError(f"{folder}: {found}, expected safetensors", _CONVERT.format(folder))
    gguf = next((name for name in names if name.endswith(".gguf")), None)
    if gguf:
        return CheckpointError(
            f"{folder}: found {gguf}, a quantised export",
            "use the original checkpoint in safetensors form",
        )
    return CheckpointError(f"{folder}: no weights: neither {SINGLE} nor {INDEX}", "check the path")
