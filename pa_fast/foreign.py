"""Untrusted text and documents: made printable, shortened, and read without exhausting memory or
time."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from typing import Any

MESSAGE_CHARACTERS = 4000
"""Most characters of a message; no real one comes near it."""

_NUMBER_CHARACTERS = 400  # base 60 has numbers that take a second per 100 kB
_NUMBERS = {"tag:yaml.org,2002:int", "tag:yaml.org,2002:float"}
_UNPRINTABLE = re.compile(r"[^\n\x20-\x7e]")


def printable(text: str) -> str:
    """Return `text` with every character escaped that is neither printable, a space nor a line
    break.

    Escaped are control characters (terminal escapes, carriage return, bell), the marks that reverse
    or hide text (bidi overrides, zero-width characters) and unpaired surrogates, in Python's
    notation: `\\x1b`, `\\u202e`.
    """
    return text if text.isprintable() else _UNPRINTABLE.sub(_escaped, text)


def one_line(text: str, most: int | None = None) -> str:
    """Return `text` printable, with line breaks escaped too, and cut to `most` characters."""
    if most is not None and len(text) > most:
        text = text[: most + 1]  # before the work of escaping
    line = printable(text).replace("\n", "\\n")
    return line if most is None else shortened(line, most)


def shortened(text: str, most: int = MESSAGE_CHARACTERS) -> str:
    """Return `text`, the end replaced by `...` where it has more than `most` characters."""
    return text if len(text) <= most else text[: most - 3] + "..."


def is_deep(document: Any, most: int = 64) -> bool:
    """Return whether lists and mappings are nested deeper than `most` levels, too deep for code
    that recurses."""
    level: list[Any] = [document] if isinstance(document, (dict, list)) else []
    for _ in range(most):
        level = [
            v
            for part in level
            for v in (part.values() if isinstance(part, dict) else part)
            if isinstance(v, (dict, list))
        ]
    return bool(level)


class YamlError(ValueError):
    """A YAML text is refused, and why. `line`, from 1, is that of valid YAML that is not allowed
    here, else None."""

    def __init__(self, message: str, line: int | None = None):
        super().__init__(message)
        self.message, self.line = message, line


def load_yaml(text: str, loader: Any) -> Any:
    """Return the document in `text`, None where it is empty.

    Args:
        loader: a class of PyYAML.

    Raises:
        YamlError: not YAML, nested too deep, an alias (a few hundred bytes of them stand for
            billions of values), a key that a mapping has twice (YAML takes the last), or a number
            of more than 400 characters.
    """
    import yaml

    try:
        reader = loader(text)
        tree = reader.get_single_node()
        _check_nodes(tree)
        return None if tree is None else reader.construct_document(tree)
    except YamlError:
        raise
    except RecursionError:
        raise YamlError("nested too deep") from None
    except (yaml.YAMLError, ValueError) as error:
        raise YamlError(" ".join(str(error).split())) from None


def _check_nodes(tree: Any) -> None:
    seen: set[int] = set()
    nodes = [tree] if tree is not None else []
    while nodes:
        node = nodes.pop()
        line = node.start_mark.line + 1
        if id(node) in seen:
            raise YamlError("found an alias of what begins here", line)
        seen.add(id(node))
        if node.id == "mapping":
            keys = [key for key, _ in node.value]
            if any(key.id != "scalar" for key in keys):
                raise YamlError("a key is no plain text", line)
            twice = {
                value for value, count in Counter(key.value for key in keys).items() if count > 1
            }
            if twice:
                first = next(key for key in keys if key.value in twice)
                raise YamlError(
                    f"`{one_line(first.value, 120)}` is given twice", first.start_mark.line + 1
                )
            nodes += [*keys, *(value for _, value in node.value)]
        elif node.id == "sequence":
            nodes += node.value
        elif node.tag in _NUMBERS and len(node.value) > _NUMBER_CHARACTERS:
            raise YamlError(f"a number of {len(node.value)} characters", line)


def _escaped(match: re.Match[str]) -> str:
    character = match[0]
    if character.isprintable() or unicodedata.category(character) == "Zs":
        return character
    return character.encode("unicode_escape").decode()
