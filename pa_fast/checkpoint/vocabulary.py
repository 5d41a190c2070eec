"""Token ids that mean different tokens in base and instruct: compared in the two tokenizer.json
files."""

from __future__ import annotations

import filecmp
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pa_fast.checkpoint.document import quoted, read_object, regular_size
from pa_fast.errors import CheckpointError, PairError

_LIMIT_BYTES = 500_000_000  # the largest published tokenizer.json are about 35 MB
_HINT = "embedding rows are merged by id: use checkpoints that share one vocabulary"


@dataclass(frozen=True)
class Vocabulary:
    """Tokens by id; `added` are the ids of added tokens, special ones among them."""

    tokens: Mapping[int, str]
    added: frozenset[int]


def compare_vocabularies(base: Path, instruct: Path, *, required: bool = False) -> tuple[str, ...]:
    """Notes on harmless differences between the vocabularies of two checkpoint folders.

    An added token may be renamed (a reserved token that instruct puts to use): that is a note. A
    normal token may not, and a token that both sides know must have the same id.

    Args:
        required: refuse a pair whose ids cannot be compared, instead of noting it.

    Raises:
        PairError: an id means different tokens; the first ids are named.
        CheckpointError: tokenizer.json is not one.
    """
    files = base / "tokenizer.json", instruct / "tokenizer.json"
    missing = [str(file.parent) for file in files if not (file.exists() or file.is_symlink())]
    if missing and required:
        found = (
            f"no tokenizer.json in {' and '.join(missing)}: the sides have different vocabularies,"
            " and ids cannot be compared"
        )
        raise PairError(
            found,
            "save each tokenizer as tokenizer.json:"
            " AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)",
        )
    if missing:
        return (f"token ids were not compared: no tokenizer.json in {' and '.join(missing)}",)
    if regular_size(files[0]) == regular_size(files[1]) and filecmp.cmp(*files, shallow=False):
        return ()
    left, right = read_vocabulary(files[0]), read_vocabulary(files[1])
    if left == right:
        return ()
    renamed = [
        (i, token, right.tokens[i])
        for i, token in left.tokens.items()
        if right.tokens.get(i, token) != token
    ]
    moved = _moved(left, right)
    if moved:
        shown = "; ".join(
            f"{quoted(token)} is id {b} in base and {i} in instruct" for token, b, i in moved[:3]
        )
        raise PairError(f"{len(moved)} tokens have different ids: {shown}", _HINT)
    normal = [(i, b, t) for i, b, t in renamed if i not in left.added or i not in right.added]
    if normal:
        shown = "; ".join(
            f"id {i} is {quoted(b)} in base and {quoted(t)} in instruct" for i, b, t in normal[:3]
        )
        raise PairError(f"{len(normal)} token ids mean different tokens: {shown}", _HINT)
    notes = []
    if renamed:
        shown = ", ".join(f"{quoted(b)} -> {quoted(t)}" for _, b, t in renamed[:3])
        notes.append(f"{len(renamed)} added tokens are renamed in instruct: {shown}")
    for side, own, other in (("base", left, right), ("instruct", right, left)):
        only = [token for i, token in own.tokens.items() if i not in other.tokens]
        if only:
            notes.append(
                f"{len(only)} token ids are in the tokenizer of {side} only:"
                f" {', '.join(map(quoted, only[:3]))}"
            )
    return tuple(notes)


def read_vocabulary(file: Path) -> Vocabulary:
    """The vocabulary of a tokenizer.json (BPE, WordPiece, WordLevel or Unigram) with its added
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


def _moved(left: Vocabulary, right: Vocabulary) -> list[tuple[str, int, int]]:
    """Tokens known to both sides under different ids."""
    ids = {token: i for i, token in right.tokens.items()}
    return [
        (token, i, ids[token])
        for i, token in left.tokens.items()
        if ids.get(token, i) != i and right.tokens.get(i) != token
    ]
