"""YAML suites: a file that lists evaluators, as EVAL strings or as mappings."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from pa_fast.errors import EvaluatorError, UsageError
from pa_fast.evals import spec
from pa_fast.evals.kind import EvalSpec
from pa_fast.evals.rows import read_file
from pa_fast.foreign import YamlError, load_yaml

SUFFIXES = (".yaml", ".yml")
LIMIT_CHARACTERS = 200_000  # PyYAML reads some 30 kB a second


def parse_all(texts: Iterable[str]) -> list[EvalSpec]:
    """Return the evaluators that EVAL arguments name, in order; for a YAML file all that it lists.

    Raises:
        UsageError: an EVAL is wrong; in a suite, file and entry are named.
        EvaluatorError: a suite cannot be read, or is not a list.
    """
    specs: list[EvalSpec] = []
    for text in texts:
        specs += read_suite(text) if _is_suite(text) else [spec.parse(text)]
    return specs


def read_suite(path: str | pathlib.Path) -> list[EvalSpec]:
    """Return the evaluators of a suite file: a list of EVAL strings, or of mappings such as
    `{eval: icl, file: tasks.jsonl, shots: 5, name: few-shot}`. Relative paths begin in the file's
    folder.
    """
    import yaml

    path = pathlib.Path(path)
    text = read_file(path, "suite").text
    if len(text) > LIMIT_CHARACTERS:
        raise EvaluatorError(
            f"{path}: {len(text)} characters, expected a suite of at most {LIMIT_CHARACTERS}",
            "give a suite file",
        )
    try:
        entries = load_yaml(text, yaml.SafeLoader)
    except YamlError as error:
        if error.line is not None:
            raise UsageError(
                f"{path}:{error.line}: {error.message}",
                "write each entry out, with each option once",
            ) from None
        raise EvaluatorError(
            f"{path}: not YAML ({error.message})",
            "write a list of EVAL strings, one a line after a dash",
        ) from None
    if not isinstance(entries, list) or not entries:
        kind = "nothing" if not entries else f"a {type(entries).__name__}"
        raise EvaluatorError(
            f"{path}: found {kind}, expected a list of evaluators",
            "one a line after a dash, each an EVAL",
        )
    return [_entry(path, number, entry) for number, entry in enumerate(entries, start=1)]


def _entry(path: pathlib.Path, number: int, entry: Any) -> EvalSpec:
    where = f"{path}: entry {number}"
    try:
        if isinstance(entry, str) and not _is_suite(entry):
            return replace(spec.parse(entry, path.parent), where=where)
        if isinstance(entry, dict):
            return replace(_mapped(dict(entry), path.parent), where=where)
    except UsageError as error:
        raise UsageError(f"{where}: {error.message}", error.hint) from None
    raise UsageError(
        f"{where}: found {entry!r}, expected an EVAL string or a mapping with `eval`",
        f"for example {_EXAMPLE}",
    )


def _mapped(entry: dict[Any, Any], folder: pathlib.Path) -> EvalSpec:
    if "eval" not in entry:
        near = next((hint for key in entry if (hint := spec.nearest(str(key), ["eval"]))), "")
        raise UsageError(f"found {entry!r}, expected a key `eval`", f"{near}for example {_EXAMPLE}")
    name = str(entry.pop("eval"))
    takes = spec.KINDS[name].takes if name in spec.KINDS else "file"
    if name in spec.KINDS:
        known = ("eval", takes, *spec.KINDS[name].options, "name")
        for key in entry:
            if key not in known:
                raise UsageError(
                    f"{name} has no key `{key}`",
                    f"{spec.nearest(str(key), known)}keys of {name}: {', '.join(known)}",
                )
    listed = entry.pop(takes, [])
    targets = [_text(takes, one) for one in (listed if isinstance(listed, list) else [listed])]
    options = {str(key): _text(str(key), value) for key, value in entry.items()}
    shown = ",".join([*targets, *(f"{key}={value}" for key, value in options.items())])
    return spec.checked(f"{name}:{shown}", name, targets, options, folder)


def _text(key: str, value: Any) -> str:
    """Return a YAML scalar as an EVAL string would have it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (str, int, float)):
        return str(value)
    raise UsageError(
        f"`{key}` is {value!r}, expected a text or a number", f"for example {_EXAMPLE}"
    )


def _is_suite(text: str) -> bool:
    return text.endswith(SUFFIXES) and text.partition(":")[0] not in spec.KINDS


_EXAMPLE = "{eval: icl, file: tasks.jsonl, shots: 5}"
