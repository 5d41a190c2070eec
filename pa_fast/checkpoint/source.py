"""Where a checkpoint is: a local folder, or a hub id that `huggingface_hub` downloads."""

from __future__ import annotations

import os
import re
from pathlib import Path

from pa_fast.checkpoint.companions import TEMPLATES
from pa_fast.errors import CheckpointError

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
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def resolve(spec: str | Path) -> Path:
    """The local folder of `spec`: an existing folder, or a hub id `org/name[@revision]` (downloaded
    once, then cached).

    Offline mode is `huggingface_hub`'s own (HF_HUB_OFFLINE=1): then only what is cached is found.

    Raises:
        CheckpointError: neither a folder nor a hub id, or the download failed.
    """
    folder = Path(spec).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(
            f"{spec}: found a file, expected a folder",
            "give the folder that holds config.json and the weights",
        )
    name, _, revision = str(spec).partition("@")
    if isinstance(spec, Path) or not _HUB_ID.fullmatch(name):
        expected = "neither a local folder nor a hub id `org/name[@revision]`"
        raise CheckpointError(f"{spec}: {expected}", "check the path")
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(
            name, revision=revision or None, allow_patterns=_WANTED, ignore_patterns=_UNWANTED
        )
        # patterns know no folders: what is unwanted would leave these out too
        snapshot_download(name, revision=Path(found).name, allow_patterns=[_TEMPLATES])
    except (
        Exception
    ) as error:  # the hub client raises its own, requests', httpx' and plain OS errors
        reason = " ".join(str(error).split()) or type(error).__name__
        hint = (
            "there is no such local folder; for the hub check the id, the revision, your access"
            " token and HF_HUB_OFFLINE"
        )
        raise CheckpointError(
            f"{spec}: cannot be fetched from the hub: {reason[:300]}", hint
        ) from error
    return Path(found)


def located(spec: str | Path) -> str:
    """`spec` as another process in another folder would find it: an absolute path, or the hub id as
    it is."""
    path = Path(spec).expanduser()
    return os.path.abspath(path) if path.exists() else str(spec)


def revision(folder: Path) -> str | None:
    """The commit of a folder inside a hub cache (`snapshots/COMMIT`); None for any other folder."""
    return (
        folder.name
        if folder.parent.name == "snapshots" and re.fullmatch(r"[0-9a-f]{40}", folder.name)
        else None
    )
