"""Vocabulary rows: token ids of both sides, rows that one side alone has, and rows that were never
trained.
"""

from __future__ import annotations

import contextlib
import filecmp
import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pa_fast.checkpoint.folder import TEMPLATES
from pa_fast.checkpoint.reader import Checkpoint
from pa_fast.checkpoint.safetensors import FLOATS, TensorInfo, quoted, read_object, regular_size
from pa_fast.errors import CheckpointError, PairError

_LIMIT_BYTES = 500_000_000  # the largest published tokenizer.json are about 35 MB
_HINT = "embedding rows are merged by id: use checkpoints that share one vocabulary"


@dataclass(frozen=True)
class Vocabulary:
    """Tokens by id; `added` are the ids of added tokens, including special ones."""

    tokens: Mapping[int, str]
    added: frozenset[int]


def compare_vocabularies(base: Path, instruct: Path, *, required: bool = False) -> tuple[str, ...]:
    """Return notes on harmless differences between the vocabularies of two checkpoint folders.

    An added token may be renamed (a reserved token that instruct uses): that gives a note. A normal
    token may not, and a token that both sides know must have the same id.

    Args:
        required: refuse a pair whose ids cannot be compared, instead of noting it.

    Raises:
        PairError: an id means different tokens; the first ids are named.
        CheckpointError: a tokenizer.json is malformed.
    """
    files = base / "tokenizer.json", instruct / "tokenizer.json"
    missing = [str(file.parent) for file in files if not (file.exists() or file.is_symlink())]
    if missing and required:
        reason = (
            f"no tokenizer.json in {' and '.join(missing)}: the sides have different vocabularies,"
            " and ids cannot be compared"
        )
        raise PairError(
            reason,
            "save each tokenizer as tokenizer.json:"
            " AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)",
        )
    if missing:
        return (f"token ids were not compared: no tokenizer.json in {' and '.join(missing)}",)
    if regular_size(files[0]) == regular_size(files[1]) and filecmp.cmp(*files, shallow=False):
        return ()
    base_tokens, instruct_tokens = read_vocabulary(files[0]), read_vocabulary(files[1])
    if base_tokens == instruct_tokens:
        return ()
    renamed = [
        (i, token, instruct_tokens.tokens[i])
        for i, token in base_tokens.tokens.items()
        if instruct_tokens.tokens.get(i, token) != token
    ]
    moved = _moved(base_tokens, instruct_tokens)
    if moved:
        shown = "; ".join(
            f"{quoted(token)} is id {b} in base and {i} in instruct" for token, b, i in moved[:3]
        )
        raise PairError(f"{len(moved)} tokens have different ids: {shown}", _HINT)
    normal = [
        (i, b, t)
        for i, b, t in renamed
        if i not in base_tokens.added or i not in instruct_tokens.added
    ]
    if normal:
        shown = "; ".join(
            f"id {i} is {quoted(b)} in base and {quoted(t)} in instruct" for i, b, t in normal[:3]
        )
        raise PairError(f"{len(normal)} token ids mean different tokens: {shown}", _HINT)
    notes = []
    if renamed:
        shown = ", ".join(f"{quoted(b)} -> {quoted(t)}" for _, b, t in renamed[:3])
        notes.append(f"{len(renamed)} added tokens are renamed in instruct: {shown}")
    for side, own, other in (
        ("base", base_tokens, instruct_tokens),
        ("instruct", instruct_tokens, base_tokens),
    ):
        only = [token for i, token in own.tokens.items() if i not in other.tokens]
        if only:
            notes.append(
                f"{len(only)} token ids are in the tokenizer of {side} only:"
                f" {', '.join(map(quoted, only[:3]))}"
            )
    return tuple(notes)


def read_vocabulary(file: Path) -> Vocabulary:
    """Read the vocabulary of a tokenizer.json (BPE, WordPiece, WordLevel or Unigram) with its added
    tokens.

    Raises:
        CheckpointError: not of that form.
    """
    document = read_object(file, _LIMIT_BYTES)
    try:
        tokens = _model_tokens(document["model"]["vocab"])
        added = {
            _id(entry["id"]): _text(entry["content"])
            for entry in document.get("added_tokens") or []
        }
    except (KeyError, TypeError, ValueError, IndexError):
        raise CheckpointError(
            f"{file}: not a tokenizer.json: no vocabulary of tokens and ids", "download it again"
        ) from None
    return Vocabulary(tokens | added, frozenset(added))


def _model_tokens(vocab: Any) -> dict[int, str]:
    if isinstance(vocab, dict):
        return {_id(index): token for token, index in vocab.items()}
    return {index: _text(entry[0]) for index, entry in enumerate(vocab)}


def _id(value: Any) -> int:
    if type(value) is not int:
        raise TypeError
    return value


def _text(value: Any) -> str:
    if type(value) is not str:
        raise TypeError
    return value


def _moved(base: Vocabulary, instruct: Vocabulary) -> list[tuple[str, int, int]]:
    """Return the tokens that both sides know under different ids."""
    ids = {token: i for i, token in instruct.tokens.items()}
    return [
        (token, i, ids[token])
        for i, token in base.tokens.items()
        if ids.get(token, i) != i and instruct.tokens.get(i) != token
    ]


# --- rows
#
# A row of an embedding or output head belongs to a token id. Where one side has more rows, the ids
# that both have are merged, and the rest is kept as it is, from the side that has it, at every λ.
# A tensor has vocabulary rows if its first size is a `vocab_size` of its own config.json.

Rows = dict[str, tuple[int, int]]
"""Tensor name → vocabulary rows in base and in instruct."""


@dataclass(frozen=True)
class KeptRows:
    """Rows `first` to `last` of `tensors`, which `side` alone has. They are the same at every λ."""

    side: str
    first: int
    last: int
    tensors: tuple[str, ...]

    def __str__(self) -> str:
        which = (
            f"row {self.first}" if self.first == self.last else f"rows {self.first} to {self.last}"
        )
        return (
            f"{which} of {', '.join(map(quoted, self.tensors))}: in {self.side} only, kept as they"
            " are at every λ"
        )


def vocabulary_sizes(config: Mapping[str, Any]) -> frozenset[int]:
    """Return every `vocab_size` that a configuration states, including those of nested models."""
    sizes = {value for key, value in config.items() if key == "vocab_size" and type(value) is int}
    return frozenset(sizes).union(
        *(vocabulary_sizes(part) for part in config.values() if isinstance(part, Mapping))
    )


def may_be_extended(
    base: tuple[int, ...], instruct: tuple[int, ...], sizes: tuple[frozenset[int], frozenset[int]]
) -> bool:
    """Return whether two shapes differ in vocabulary rows alone; `sizes` are the vocabulary sizes
    of base and instruct."""
    return (
        bool(base and instruct)
        and base[1:] == instruct[1:]
        and base[0] in sizes[0]
        and instruct[0] in sizes[1]
    )


def with_vocabulary_sizes(config: Mapping[str, Any], sizes: Mapping[int, int]) -> dict[str, Any]:
    """Return `config` with every `vocab_size` that is a key of `sizes` replaced by its value."""
    changed = {
        key: with_vocabulary_sizes(value, sizes) if isinstance(value, Mapping) else value
        for key, value in config.items()
    }
    stated = changed.get("vocab_size")
    return (
        {**changed, "vocab_size": sizes[stated]}
        if type(stated) is int and stated in sizes
        else changed
    )


def extended(
    base: Mapping[str, TensorInfo], instruct: Mapping[str, TensorInfo], *configs: Mapping[str, Any]
) -> Rows:
    """Return the float tensors on both sides whose shapes differ in vocabulary rows alone;
    `configs` are base's and instruct's."""
    sizes = vocabulary_sizes(configs[0]), vocabulary_sizes(configs[1])
    return {
        name: (base[name].shape[0], info.shape[0])
        for name, info in instruct.items()
        if name in base
        and base[name].shape != info.shape
        and {base[name].dtype, info.dtype} <= FLOATS
        and may_be_extended(base[name].shape, info.shape, sizes)
    }


def check_vocabulary(
    base: Checkpoint, instruct: Checkpoint, rows: Rows, extra_rows: str
) -> tuple[str, ...]:
    """Compare the meaning of token ids, and apply the policy for vocabulary rows that one side
    alone has.

    Args:
        rows: tensors that have such rows, see `extended`.
        extra_rows: `instruct` keeps such rows as they are, `refuse` refuses the pair.

    Returns: sentences for the user.

    Raises:
        PairError: an id means different tokens; or rows are refused, or cannot be compared by id.
        CheckpointError: a tokenizer.json is malformed.
    """
    notes = compare_vocabularies(base.folder, instruct.folder, required=bool(rows))
    if rows and extra_rows == "refuse":
        name, (b, i) = next(iter(rows.items()))
        actual = f"{b} vocabulary rows in base and {i} in instruct, expected as many"
        raise PairError(
            f"tensor {quoted(name)}: {actual}",
            "--extra-rows instruct keeps rows that one side alone has",
        )
    return notes + tuple(map(str, kept_rows(rows)))


def kept_rows(rows: Rows) -> tuple[KeptRows, ...]:
    """Return the rows that one side alone has, with tensors of equal rows together."""
    groups: dict[tuple[int, int], list[str]] = {}
    for name, sizes in rows.items():
        groups.setdefault(sizes, []).append(name)
    return tuple(
        KeptRows("base" if b > i else "instruct", min(b, i), max(b, i) - 1, tuple(names))
        for (b, i), names in groups.items()
    )


# --- untrained
#
# Some base models were never trained on the tokens that end a turn or name a speaker: those rows of
# the embedding are near zero. At small λ the merge pulls instruct's rows towards zero too, and a
# chat may not stop. The merge is still correct, so this is a note.

# share of the median row's norm; trained rows lie within a small factor of it, untrained ones below
# 1e-6
NEAR_ZERO = 0.01
_SAMPLED = 32
_MOST = 64


def untrained_rows(base: Checkpoint, instruct: Checkpoint) -> tuple[str, ...]:
    """Return a note for each embedding or head of either side in which rows of instruct's chat
    tokens are near zero.

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
                ids = _near_zero(checkpoint, info, tokens)
                if ids:
                    shown = ", ".join(quoted(tokens[i]) for i in ids[:3]) + (
                        f" and {len(ids) - 3} more" if ids[3:] else ""
                    )
                    notes.append(
                        f"{quoted(info.name)} of {side} was never trained for {shown}, which chats"
                        " use: their rows are near zero"
                        + (", and at small λ a chat may not stop" if side == "base" else "")
                    )
    return tuple(notes)


def chat_tokens(folder: Path, config: Mapping[str, Any]) -> dict[int, str]:
    """Return the tokens that chats of the checkpoint in `folder` consist of, by id: the added
    tokens in its template, and stop tokens.

    At most 64; missing and unreadable files count as empty.
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


def mistaken_sides(base: Checkpoint, instruct: Checkpoint) -> list[str]:
    """Return a note if the two sides are one folder, or if the base alone has a chat template: they
    are then probably swapped."""
    if base.folder.resolve() == instruct.folder.resolve():
        return [f"both sides are {base.folder}: the model is the same at every λ"]
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
    """Yield every chat template of a folder, from all the files that can hold one."""
    for path in (folder / "chat_template.jinja", *sorted((folder / TEMPLATES).glob("*.jinja"))):
        with contextlib.suppress(OSError, UnicodeDecodeError):
            if path.is_file():  # a pipe would block
                yield path.read_text(encoding="utf-8")
    for file in ("tokenizer_config.json", "chat_template.json"):
        templates = _read(folder / file).get("chat_template")
        for one in templates if isinstance(templates, list) else [templates]:
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
