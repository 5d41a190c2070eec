"""What an output may replace: checkpoints alone, and never a source that is being read."""

from __future__ import annotations

import fnmatch
import os
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pa_fast.checkpoint.companions import PROVENANCE, TEMPLATES
from pa_fast.checkpoint.document import quoted, read_object
from pa_fast.errors import CheckpointError, OutputError

# what save_pretrained of models, tokenizers and processors, the end of a Trainer, and the hub leave
# in a model's folder
_KNOWN = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model[-.]*.safetensors",
    "consolidated*.safetensors",
    "model*.safetensors.index.json",
    "pytorch_model*.bin",
    "pytorch_model.bin.index.json",
    "tokenizer*.json",
    "tokenizer*.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece*.model",
    "*.tiktoken",
    "tekken.json",
    "chat_template.json",
    "chat_template.jinja",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "image_processor_config.json",
    "training_args.bin",
    "trainer_state.json",
    "all_results.json",
    "train_results.json",
    "eval_results.json",
    "README.md",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
    ".gitattributes",
    PROVENANCE,
)
# folder → the only files that may be in it
_KNOWN_FOLDERS = {TEMPLATES: "*.jinja"}


def check_replaceable(folder: Path) -> None:
    """Refuse to replace `folder` unless it is a checkpoint, and all that it holds is a
    checkpoint's.

    Known by name are the files that `save_pretrained`, the end of a Trainer and the hub write, and
    those that the folder's own pa_fast.json lists. What a training could go on from
    (`optimizer.pt`, `checkpoint-500/`) is not among them.

    Raises:
        OutputError: it is no checkpoint, or it holds something else, which is named.
    """
    names = sorted(os.listdir(folder))
    listed = _listed(folder)
    if listed is None and not _is_model_config(folder):
        raise OutputError(
            f"{folder}: not empty: found {', '.join(names[:3])}, which is no checkpoint",
            "only a checkpoint is replaced: remove the folder yourself, or choose another --out",
        )
    foreign = foreign_names(folder)
    if foreign:
        more = f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
        raise OutputError(
            f"{folder}: holds {', '.join(map(quoted, foreign[:3]))}{more}, which no checkpoint"
            " consists of",
            "replacing the folder would remove that: move it elsewhere, or choose another --out",
        )


def foreign_names(folder: Path) -> list[str]:
    """Return the names in `folder` that no checkpoint consists of."""
    listed = _listed(folder) or frozenset()
    return [name for name in sorted(os.listdir(folder)) if not _is_known(folder / name, listed)]


def check_apart(outputs: Iterable[Path], sources: Iterable[Path]) -> None:
    """Refuse outputs that are, hold or lie in a source folder, or hold a file that one of its links
    leads to.

    Args:
        outputs: the folder that is written, and its working names.
        sources: checkpoint folders and files that are read.

    Raises:
        OutputError: naming output and source.
    """
    places = [(output, Path(os.path.realpath(output))) for output in outputs]
    for source in sources:
        root = Path(os.path.realpath(source))
        entries = sorted(source.iterdir()) if source.is_dir() else []
        for output, place in places:
            if place == root or place in root.parents or root in place.parents:
                raise OutputError(
                    f"{output}: is, holds or lies in the source {source}", "choose another --out"
                )
            for entry in entries:
                if place in Path(os.path.realpath(entry)).parents:
                    raise OutputError(
                        f"{output}: holds what {entry} of a source is a link to",
                        "choose another --out",
                    )


def _listed(folder: Path) -> frozenset[str] | None:
    """The file names that the pa_fast.json of `folder` lists; None where there is none of a
    merge."""
    document = _object(folder / PROVENANCE)
    if not document.keys() >= {"format", "lambda", "base", "instruct"}:
        return None
    files = document.get("files", [])
    return (
        frozenset(name for name in files if isinstance(name, str))
        if isinstance(files, list)
        else frozenset()
    )


def _is_model_config(folder: Path) -> bool:
    document = _object(folder / "config.json")
    return isinstance(document.get("model_type"), str) or isinstance(
        document.get("architectures"), list
    )


def _object(path: Path) -> Mapping[str, Any]:
    try:
        return read_object(path) if os.path.lexists(path) else {}
    except CheckpointError:
        return {}


def _is_known(path: Path, listed: frozenset[str]) -> bool:
    mode = os.lstat(path).st_mode
    if stat.S_ISDIR(mode):
        if path.name == ".cache":
            return os.listdir(path) == ["huggingface"]
        pattern = _KNOWN_FOLDERS.get(path.name)
        return pattern is not None and all(
            fnmatch.fnmatchcase(one.name, pattern) and not one.is_dir() for one in path.iterdir()
        )
    return path.name in listed or any(fnmatch.fnmatchcase(path.name, pattern) for pattern in _KNOWN)
