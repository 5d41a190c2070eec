"""Kinds of evaluators, and parsed EVAL strings."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field

from pa_fast.base import Evaluator
from pa_fast.errors import UsageError

_ESCAPES = {"n": "\n", "t": "\t", "\\": "\\"}
UNNAMEABLE = re.compile(r"[/\\\x00-\x1f\x7f\u0085\u2028\u2029]")


def stem(target: str) -> str:
    """Return a file's name without folder and ending: `data/tasks.jsonl` → `tasks`."""
    return pathlib.Path(target).stem


@dataclass(frozen=True)
class EvaluatorKind:
    """A row of the table of evaluators.

    Attributes:
        takes: the kind of its targets (`file`, `function`, `task`); also their key in a YAML suite.
        options: names of its options, beside `name`, which every evaluator has.
        build: (parsed EVAL, limit, seed) → evaluator; reads and checks its data, loads no model.
        many: more than one target is allowed.
        label: target → its text in the column.
        paths: options whose values are paths.
    """

    name: str
    takes: str
    example: str
    options: tuple[str, ...]
    build: Callable[[EvalSpec, int | None, int], Evaluator]
    many: bool = False
    label: Callable[[str], str] = stem
    paths: tuple[str, ...] = ()


@dataclass(frozen=True)
class EvalSpec:
    """One parsed EVAL: its text, kind, targets and options, all still text.

    `folder` is where relative paths begin: the current one, or that of the suite file. `where` is
    the suite file and the entry in it, for errors, or empty.
    """

    text: str
    kind: EvaluatorKind
    targets: tuple[str, ...]
    options: dict[str, str] = field(default_factory=dict)
    folder: pathlib.Path = pathlib.Path()
    where: str = ""

    @property
    def name(self) -> str:
        return self.kind.name

    @property
    def target(self) -> str:
        return self.targets[0]

    @property
    def column(self) -> str:
        """The name in results, without options that a name cannot hold (`sep=\\n`); the identity
        has these too."""
        if "name" in self.options:
            return self.options["name"]
        shown = {
            key: stem(value) if key in self.kind.paths else value
            for key, value in self.options.items()
        }
        options = [f"{key}={value}" for key, value in shown.items() if not UNNAMEABLE.search(value)]
        return f"{self.name}:{','.join([*map(self.kind.label, self.targets), *options])}"

    def path(self, value: str) -> pathlib.Path:
        """Return a target or an option as a path."""
        return self.folder / value

    def count(self, key: str, default: int, *, least: int) -> int:
        """Return an option that is a whole number from `least`."""
        value = self.options.get(key, str(default))
        if not re.fullmatch(r"[0-9]{1,9}", value) or int(value) < least:
            raise UsageError(
                f"`{self.text}`: {key}={value}, expected a whole number from {least}",
                f"for example {key}={default}",
            )
        return int(value)

    def word(self, key: str, words: tuple[str, ...]) -> str:
        """Return an option that is one of `words`; the first is the default."""
        value = self.options.get(key, words[0])
        if value not in words:
            raise UsageError(
                f"`{self.text}`: {key}={value} is not available", f"{key}: {', '.join(words)}"
            )
        return value

    def flag(self, key: str, default: bool) -> bool:
        """Return an option that is `true` or `false`."""
        return self.word(key, ("true", "false") if default else ("false", "true")) == "true"

    def string(self, key: str, default: str) -> str:
        """Return an option that is any text; `\\n`, `\\t` and `\\\\` become a line break, a tab and
        a backslash."""
        return re.sub(
            r"\\([nt\\])", lambda match: _ESCAPES[match[1]], self.options.get(key, default)
        )
