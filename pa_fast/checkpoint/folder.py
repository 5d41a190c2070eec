"""A checkpoint folder: its location, its weight files, and the files beside them."""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from pa_fast.checkpoint.safetensors import (
    FLOATS,
    Header,
    TensorInfo,
    quoted,
    read_header,
    read_object,
    refuse_pointer,
    regular_size,
)
from pa_fast.errors import CheckpointError
from pa_fast.files import path_of

PROVENANCE = "pa_fast.json"
TEMPLATES = "additional_chat_templates"
# weights and training state of any kind: the merge has its own
_NOT_COPIED = (
    ".safetensors",
    ".index.json",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".h5",
    ".msgpack",
    ".gguf",
    ".onnx",
    ".pkl",
    ".pickle",
    ".npz",
    ".tflite",
)
_WRITTEN = {"config.json", "README.md", PROVENANCE}


@dataclass(frozen=True)
class Companion:
    """A file of a checkpoint folder: its `name` in the folder (with a slash if it lies in a folder
    within), its `path` with links resolved, and its length."""

    name: str
    path: Path
    size_bytes: int

    def open(self) -> BinaryIO:
        """Open the file for reading.

        Raises:
            OSError: it cannot be opened, or is no longer a plain file.
        """
        fd = os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise OSError(errno.EINVAL, "not a regular file any more", str(self.path))
        return os.fdopen(fd, "rb")


def copied(folder: Path) -> list[Companion]:
    """Return the files that a merge copies from the instruct checkpoint `folder`.

    Raises:
        CheckpointError: see `check_companions`.
    """
    check_companions(folder)
    files = (
        path
        for path in _files(folder)
        if path.name not in _WRITTEN and not path.name.startswith("adapter_")
    )
    return [
        Companion(
            path.relative_to(folder).as_posix(), Path(os.path.realpath(path)), regular_size(path)
        )
        for path in files
    ]


def check_companions(folder: Path) -> None:
    """Refuse a checkpoint folder in which a file leads out of the folder, leads to nothing, or is a
    pipe or a device.

    Links within the folder are fine, and so are those of a hub cache:
    `models--ORG--NAME/snapshots/COMMIT/FILE` → `../../blobs/…`.

    Raises:
        CheckpointError: naming the file; also if it is a git-lfs pointer.
    """
    for path in _files(folder):
        regular_size(path)
        with path.open("rb") as file:
            refuse_pointer(path, file.read(1024))
    root = Path(os.path.realpath(folder))
    homes = [root]
    if root.parent.name == "snapshots" and root.parent.parent.name.startswith("models--"):
        homes.append(root.parent.parent / "blobs")
    for path in _files(folder):
        real = Path(os.path.realpath(path))
        if not any(home in real.parents for home in homes):
            raise CheckpointError(
                f"{path}: a link that leads out of the folder, to {real}",
                "a file of another place may be none of this checkpoint's: put a copy in place of"
                " the link, if it is",
            )


def check_regular(folder: Path) -> None:
    """Refuse a checkpoint folder in which a file is a pipe or a device, because opening or reading
    it may never end.

    Raises:
        CheckpointError: naming the file.
    """
    for path in _files(folder):
        if path.exists():
            regular_size(path)


def _files(folder: Path) -> Iterator[Path]:
    """Yield everything but weights, hidden files and folders."""
    for path in sorted(folder.iterdir()):
        if path.name == TEMPLATES and path.is_dir():
            yield from sorted(path.glob("*.jinja"))
        elif (
            not path.name.startswith(".")
            and not path.name.endswith(_NOT_COPIED)
            and not path.is_dir()
        ):
            yield path


# --- quantised
#
# Quantised checkpoints are recognised by names and dtypes. Their weights are codes, which cannot be
# interpolated.

_CODE_DTYPES = {"F4": "fp4", "F6_E2M3": "fp6", "F6_E3M2": "fp6"}
_CODE_NAMES = {
    ".qweight": "GPTQ or AWQ",
    ".qzeros": "GPTQ or AWQ",
    ".weight_packed": "compressed-tensors",
    ".SCB": "bitsandbytes 8-bit",
    ".weight.absmax": "bitsandbytes 4-bit",
    ".weight.quant_map": "bitsandbytes 4-bit",
    ".weight_scale_inv": "fp8",
    "_proj_blocks": "mxfp4",
    ".W_q": "HQQ",
    ".codebooks": "AQLM",
}


def check_not_quantised(
    folder: Path, config: Mapping[str, Any], tensors: Iterable[TensorInfo]
) -> None:
    """Refuse a quantised checkpoint, and one whose config.json claims a quantisation that its
    weights do not have.

    Raises:
        CheckpointError: a tensor holds codes; or config.json has a quantisation key, because of
            which a loader would read plain weights as codes, or quantise them.
    """
    tensors = list(tensors)
    coded = next((phrase for phrase in map(_codes, tensors) if phrase), None)
    keys = [
        (prefix, key, entry)
        for prefix, part in (
            ("", config),
            *((f"{k}.", v) for k, v in config.items() if isinstance(v, Mapping)),
        )
        for key in ("quantization_config", "compression_config")
        if isinstance(entry := part.get(key), Mapping)
    ]
    if coded:
        raise CheckpointError(
            f"{folder}: a quantised checkpoint: {coded}",
            "use the original 16- or 32-bit checkpoint",
        )
    if keys:
        prefix, key, entry = keys[0]
        dtypes = " and ".join(sorted({info.dtype for info in tensors if info.dtype in FLOATS}))
        raise CheckpointError(
            f"{folder}: config.json has `{prefix}{key}` of kind"
            f" {quoted(str(entry.get('quant_method', 'unknown')))}, but the weights are not"
            f" quantised: all are plain {dtypes}",
            f"remove `{prefix}{key}` from {folder / 'config.json'}; it was left behind when the"
            " weights were converted",
        )


def _codes(info: TensorInfo) -> str | None:
    """Return a phrase for messages if `info` holds codes; else None."""
    kind = _CODE_DTYPES.get(info.dtype) or ("fp8" if info.dtype.startswith("F8_") else None)
    kind = kind or next(
        (kind for end, kind in _CODE_NAMES.items() if info.name.endswith(end)), None
    )
    if kind is None and info.name.endswith(".weight") and info.dtype in {"I8", "U8", "I32", "U32"}:
        kind = "integer codes"
    return f"tensor {quoted(info.name)} of {info.dtype} holds {kind}" if kind else None


# --- shards

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
_REDIRECTS = {"transformers_weights": "weights", "configuration_files": "a configuration"}
"""Keys of config.json that make transformers read files of other names, and what it reads there."""
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
    """Read the headers of all weight files of `folder`, in file order.

    Raises:
        CheckpointError: no weights, weights of another kind, a shard that is missing or damaged, or
            an index that names a file outside the folder or disagrees with its shards.
    """
    single, index = folder / SINGLE, folder / INDEX
    if single.exists() and index.exists():
        named = set(_weight_map(index).values())
        if named != {SINGLE}:
            actual = f"both {SINGLE} and {INDEX}, which names {len(named)} other files"
            raise CheckpointError(
                f"{folder}: found {actual}, expected one of them",
                "remove the one that is left over",
            )
    if index.exists() or index.is_symlink():
        return _indexed(folder, _weight_map(index))
    if single.exists() or single.is_symlink():
        return [read_header(single)]
    raise _no_weights(folder)


def is_adapter(folder: Path) -> bool:
    """Return whether `folder` holds an adapter and no weights beside it."""
    return (folder / ADAPTER).exists() and not any(
        (folder / name).exists() for name in (SINGLE, INDEX)
    )


def check_redirects(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of which transformers would read other weights than `read_shards`, or
    more.

    Raises:
        CheckpointError: a key of config.json names other files, or an adapter lies beside the
            weights.
    """
    for part in (config, *(value for value in config.values() if isinstance(value, Mapping))):
        for key, what in _REDIRECTS.items():
            if part.get(key) is not None:
                actual = (
                    f"`{key}` is {quoted(str(part[key]))}, from which transformers would read"
                    f" {what}"
                )
                standard = f"expected {SINGLE} or {INDEX}, and config.json itself"
                hint = f"make those files the standard ones, and remove `{key}` from config.json"
                raise CheckpointError(f"{folder / 'config.json'}: {actual}, {standard}", hint)
    if (folder / ADAPTER).exists():
        raise CheckpointError(
            f"{folder / ADAPTER}: found an adapter, which transformers would add to the weights"
            " beside it",
            "merge the adapter into them, or move its files to a folder of their own",
        )


def _weight_map(index: Path) -> dict[str, str]:
    weight_map: Any = read_object(index).get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(file, str) for file in weight_map.values())
    ):
        raise CheckpointError(
            f"{index}: `weight_map` is not an object of tensor and file names",
            "download the index again",
        )
    for name, file in weight_map.items():
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
    return weight_map


def _indexed(folder: Path, weight_map: dict[str, str]) -> list[Header]:
    index = folder / INDEX
    missing = [file for file in sorted(set(weight_map.values())) if not (folder / file).exists()]
    if missing:
        defect = (
            f"{len(missing)} of {len(set(weight_map.values()))} shards are missing:"
            f" {', '.join(missing[:3])}"
        )
        raise CheckpointError(f"{folder}: {defect}, which {INDEX} names", "complete the download")
    headers = {file: read_header(folder / file) for file in sorted(set(weight_map.values()))}
    for name, file in weight_map.items():
        if name not in headers[file].tensors:
            defect = f"tensor {quoted(name)} should be in {file}, which does not hold it"
            raise CheckpointError(
                f"{index}: {defect}",
                "index and shards are of different downloads: fetch both again",
            )
    for file, header in headers.items():
        for name in header.tensors:
            listed = weight_map.get(name)
            if listed is not None and listed != file:
                raise CheckpointError(
                    f"{folder}: tensor {quoted(name)} is in two shards, {listed} and {file};"
                    f" {INDEX} names the first",
                    "loaders differ in which they take: load the folder and save it again"
                    f" ({_RESAVE.format(folder)})",
                )
            if listed is None:
                defect = (
                    f"shard {file} holds tensor {quoted(name)}, which the index does not place"
                    " there"
                )
                raise CheckpointError(
                    f"{index}: {defect}",
                    "index and shards are of different downloads: fetch both again",
                )
    return list(headers.values())


def _cached(folder: Path) -> tuple[str, list[Path]]:
    """Return what `folder` is in a hub cache (`hub/models--ORG--NAME/snapshots/COMMIT`), as a
    phrase, and the checkpoints there, those of one repository oldest first. There are none outside
    of a cache."""
    repository = "the cache folder of a hub repository"
    if folder.name.startswith("models--"):
        what, pattern = f"{repository}, whose checkpoints are in its snapshots", "snapshots/*"
    elif folder.parent.name.startswith("models--"):
        what, pattern = f"the {folder.name} in {repository}, not a checkpoint", "snapshots/*"
        folder = folder.parent
    else:
        what, pattern = "a cache of hub repositories, not a checkpoint", "models--*/snapshots/*"
        if not any(folder.glob("models--*")):
            folder = folder / "hub"
    checkpoints = [path for path in folder.glob(pattern) if path.is_dir()]
    order = {
        path: (path.parent.parent.name, path.stat().st_mtime_ns, path.name) for path in checkpoints
    }
    return what, sorted(checkpoints, key=order.__getitem__)


def _checkpoints_in(folder: Path) -> list[Path]:
    """Return the folders directly below `folder` that hold weights."""
    return [
        path
        for path in sorted(folder.iterdir())
        if any(os.path.exists(path / name) for name in (SINGLE, INDEX))
    ]


def hub_id(folder: Path) -> str | None:
    """Return the hub id of a checkpoint in a hub cache (`models--ORG--NAME/snapshots/COMMIT`); None
    for any other folder.

    Source: `huggingface_hub`'s cache layout,
    https://huggingface.co/docs/huggingface_hub/guides/manage-cache
    """
    kind, *name = folder.parent.parent.name.split("--")
    full_name = "/".join(name)
    return (
        full_name
        if kind == "models" and folder.parent.name == "snapshots" and _HUB_ID.fullmatch(full_name)
        else None
    )


def _no_weights(folder: Path) -> CheckpointError:
    names = sorted(path.name for path in folder.iterdir())
    what, cached = _cached(Path(os.path.abspath(folder)))
    if cached:
        ids = list(dict.fromkeys(filter(None, map(hub_id, cached))))
        named = f"the hub id {ids[0]}" if len(ids) == 1 else f"a hub id: {', '.join(ids[:3])}"
        return CheckpointError(
            f"{folder}: {what}", f"give {cached[-1]}, or {named}" if ids else f"give {cached[-1]}"
        )
    if not names:
        return CheckpointError(f"{folder}: the folder is empty", "check the path")
    pickles = [
        name
        for name in names
        if name.endswith((".bin", ".pt", ".pth")) and not name.startswith("training_args")
    ]
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
        defect = f"found {', '.join(parts[:3])} but neither {SINGLE} nor {INDEX}"
        return CheckpointError(
            f"{folder}: {defect}",
            "complete the download: without the index a missing shard goes unseen",
        )
    if pickles:
        defect = (
            f"weights are pickle files only ({', '.join(pickles[:3])}), which can run code when"
            " loaded"
        )
        return CheckpointError(f"{folder}: {defect}, expected safetensors", _CONVERT.format(folder))
    gguf = next((name for name in names if name.endswith(".gguf")), None)
    if gguf:
        return CheckpointError(
            f"{folder}: found {gguf}, a quantised export",
            "use the original checkpoint in safetensors form",
        )
    within = _checkpoints_in(folder)
    return CheckpointError(
        f"{folder}: no weights: neither {SINGLE} nor {INDEX}"
        + (f", but checkpoints in {', '.join(path.name for path in within[:3])}" if within else ""),
        f"give one of these, such as {within[0]}" if within else "check the path",
    )


# --- source

# everything that a merge reads or copies; pickle weights and other exports stay on the hub
_WANTED = [
    "*.safetensors",
    "*.json",
    "*.jinja",
    "*.model",
    "*.txt",
    "*.tiktoken",
    "*.bpe",
    "*.spm",
    "*.vocab",
    "*.codes",
    "*.py",
    "LICENSE*",
    "NOTICE*",
]
_UNWANTED = ["*/*", "consolidated*.safetensors"]
_TEMPLATES = f"{TEMPLATES}/*.jinja"
_ORG_AND_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def resolve(spec: str | Path) -> Path:
    """Return the local folder of `spec`: an existing folder, or a hub id `org/name[@revision]`,
    which is downloaded once, then cached.

    Offline mode is `huggingface_hub`'s own (HF_HUB_OFFLINE=1): only cached checkpoints are found.

    Raises:
        UsageError: `spec` is no path.
        CheckpointError: neither a folder nor a hub id, or the download failed.
    """
    folder = path_of(spec, "checkpoint").expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(
            f"{spec}: found a file, expected a folder",
            "give the folder that holds config.json and the weights",
        )
    name, _, revision = str(spec).partition("@")
    if isinstance(spec, Path) or not _ORG_AND_NAME.fullmatch(name):
        expected = "neither a local folder nor a hub id `org/name[@revision]`"
        raise CheckpointError(f"{spec}: {expected}", "check the path")
    from huggingface_hub import snapshot_download

    try:
        downloaded = snapshot_download(
            name, revision=revision or None, allow_patterns=_WANTED, ignore_patterns=_UNWANTED
        )
        # patterns know no folders: what is unwanted would leave these out too
        snapshot_download(name, revision=Path(downloaded).name, allow_patterns=[_TEMPLATES])
    except Exception as error:
        # the hub client raises its own, requests', httpx' and plain OS errors
        reason = " ".join(str(error).split()) or type(error).__name__
        hint = (
            "there is no such local folder; for the hub check the id, the revision, your access"
            " token and HF_HUB_OFFLINE"
        )
        raise CheckpointError(
            f"{spec}: cannot be fetched from the hub: {reason[:300]}", hint
        ) from error
    return Path(downloaded)


def located(spec: str | Path) -> str:
    """Return `spec` as another process in another folder would find it: an absolute path, or the
    hub id unchanged."""
    path = Path(spec).expanduser()
    return os.path.abspath(path) if path.exists() else str(spec)


def revision(folder: Path) -> str | None:
    """Return the commit of a folder inside a hub cache (`snapshots/COMMIT`); None for any other
    folder."""
    return (
        folder.name
        if folder.parent.name == "snapshots" and re.fullmatch(r"[0-9a-f]{40}", folder.name)
        else None
    )
