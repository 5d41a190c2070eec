"""Token rows that were never trained: near zero on one side, used by the chats of the other.

Some base models never saw the tokens that end a turn or name a speaker: their rows of the embedding
are about zero. Instruct trained them, and at small λ the merge pulls them back towards zero: chats
may then not stop. The merge is right all the same, so this is a note.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pa_fast.checkpoint.companions import TEMPLATES
from pa_fast.checkpoint.document import quoted, read_object
from pa_fast.checkpoint.header import FLOATS, TensorInfo
from pa_fast.checkpoint.reader import Checkpoint
from pa_fast.checkpoint.rows import vocabulary_sizes
from pa_fast.checkpoint.vocabulary import read_vocabulary
from pa_fast.errors import CheckpointError

# of the median row's norm; trained rows lie within a factor of a few of it, untrained ones under
# 1e-6
NEAR_ZERO = 0.01
_SAMPLED = 32
_MOST = 64


def untrained_rows(base: Checkpoint, instruct: Checkpoint) -> tuple[str, ...]:
    """A note for each embedding or head of either side in which rows of instruct's chat tokens are
    near zero.

    Cost: reads the rows of up to 64 chat tokens and of 32 others, per tensor with vocabulary rows.

    Raises:
        DataError: a file changed since its header was read.
    """
    tokens = chat_tokens(instruct.folder, instruct.config)
    if not tokens:
        return ()
    notes = []
    for side, checkpoint in (("base", base), ("instruct", instruct)):
        sizes = vocabulary_sizes(checkpoint.config)
        for info in checkpoint.tensors.values():
            if len(info.shape) == 2 and info.shape[0] in sizes and info.dtype in FLOATS:
                found = _near_zero(checkpoint, info, tokens)
                if found:
                    shown = ", ".join(quoted(tokens[i]) for i in found[:3]) + (
                        f" and {len(found) - 3} more" if found[3:] else ""
                    )
                    notes.append(
                        f"{quoted(info.name)} of {side} was never trained for {shown}, which chats"
                        " use: their rows are near zero"
                        + (", and at small λ a chat may not stop" if side == "base" else "")
                    )
    return tuple(notes)


def chat_tokens(folder: Path, config: Mapping[str, Any]) -> dict[int, str]:
    """Tokens that chats of the checkpoint in `folder` are made of, by id: added tokens of its
    template, and stop tokens.

    At most 64; what is missing or unreadable counts as empty.
    """
    try:
        vocabulary = read_vocabulary(folder / "tokenizer.json")
    except CheckpointError:
        return {}
    template = "\n".join(_templates(folder))
    stops = set(_integers(config.get("eos_token_id"))) | set(
        _integers(_read(folder / "generation_config.json").get("eos_token_id"))
    )
    named = {
        i: vocabulary.tokens[i]
        for i in sorted(vocabulary.added)
        if i in stops or vocabulary.tokens[i] in template
    }
    return dict(itertools.islice(named.items(), _MOST))


def swapped_sides(base: Checkpoint, instruct: Checkpoint) -> list[str]:
    """A note where the base alone has a chat template: most likely the two stand in each other's
    place."""
    if any(_templates(base.folder)) and not any(_templates(instruct.folder)):
        return [
            f"only the base has a chat template: are the sides swapped? λ = 0 is {base.folder}, λ ="
            f" 1 is {instruct.folder}"
        ]
    return []


def _near_zero(checkpoint: Checkpoint, info: TensorInfo, tokens: Iterable[int]) -> list[int]:
    rows, width = info.shape
    typical = sorted(
        _norm(checkpoint, info, row) for row in range(0, rows, max(1, rows // _SAMPLED))
    )
    bound = NEAR_ZERO * typical[len(typical) // 2] if typical and width else 0.0
    return [i for i in tokens if 0 <= i < rows and _norm(checkpoint, info, i) < bound]


def _norm(checkpoint: Checkpoint, info: TensorInfo, row: int) -> float:
    import torch

    width = info.shape[1]
    return float(
        torch.linalg.vector_norm(
            checkpoint.chunk(info.name, row * width, (row + 1) * width), dtype=torch.float32
        )
    )


def _templates(folder: Path) -> Iterator[str]:
    """Every chat template of a folder, in any of the places where one can be."""
    for path in (folder / "chat_template.jinja", *sorted((folder / TEMPLATES).glob("*.jinja"))):
        with contextlib.suppress(OSError, UnicodeDecodeError):
            if path.is_file():  # a pipe would block
                yield path.read_text(encoding="utf-8")
    for file in ("tokenizer_config.json", "chat_template.json"):
        found = _read(folder / file).get("chat_template")
        for one in found if isinstance(found, list) else [found]:
            text = one.get("template") if isinstance(one, Mapping) else one
            if isinstance(text, str):
                yield text


def _read(file: Path) -> dict[str, Any]:
    try:
        return read_object(file)
    except CheckpointError:
        return {}


def _integers(value: Any) -> list[int]:
    return [one for one in (value if isinstance(value, list) else [value]) if type(one) is int]
