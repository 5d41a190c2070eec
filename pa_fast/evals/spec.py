"""EVAL strings: `NAME:TARGET[,TARGET…][,key=value…]`.

A comma inside a value is written `\\,`. A part is an option if it begins with a word and `=`; write `./a=b.txt` for a
file of such a name. Every evaluator takes `name=…`, its column in the results; without it the column is
`NAME:file-stem` and the options as given.
"""

from __future__ import annotations

import difflib
import pathlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field

from pa_fast.base import Evaluator
from pa_fast.errors import UsageError
from pa_fast.evals.files import read_file
from pa_fast.evals.function import Function
from pa_fast.evals.icl import Icl
from pa_fast.evals.perplexity import Perplexity


@dataclass(frozen=True)
class EvalSpec:
    """A parsed EVAL string: `text` as given, the evaluator's name, its targets and its options, all still text."""

    text: str
    name: str
    targets: tuple[str, ...]
    options: dict[str, str] = field(default_factory=dict)

    @property
    def target(self) -> str:
        return self.targets[0]

    @property
    def column(self) -> str:
        """The name in results. Options that cannot stand in one (`sep=\\n`) are left out; the identity has them."""
        if "name" in self.options:
            return self.options["name"]
        stem = self.target.rpartition(":")[2] if self.name == "python" else pathlib.Path(self.target).stem
        shown = {key: pathlib.Path(value).stem if key == "pool" else value for key, value in self.options.items()}
        return ",".join(
            [f"{self.name}:{stem}"] + [f"{key}={value}" for key, value in shown.items() if not _UNNAMEABLE.search(value)]
        )


def parse(text: str) -> EvalSpec:
    """Parse one EVAL string; no file is opened.

    Raises:
        UsageError: an unknown evaluator, no target or too many, an unknown or repeated option, an unusable name.
    """
    name, _, rest = text.partition(":")
    if name not in _KINDS:
        raise UsageError(
            f"`{text}`: there is no evaluator `{name}`", f"evaluators: {', '.join(_KINDS)}; for example {EXAMPLES['icl']}"
        )
    kind = _KINDS[name]
    targets: list[str] = []
    options: dict[str, str] = {}
    for part in [part.replace("\\,", ",") for part in re.split(r"(?<!\\),", rest)]:
        option = re.match(r"([A-Za-z_]\w*)=(.*)", part, re.DOTALL)
        if not part:
            raise UsageError(f"`{text}`: an empty part between commas", f"for example {kind.example}")
        if option is None:
            if options:
                raise UsageError(f"`{text}`: `{part}` after an option is not key=value", "targets come first, then options")
            targets.append(part)
            continue
        key, value = option.groups()
        if key not in kind.options:
            near = difflib.get_close_matches(key, kind.options, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise UsageError(f"`{text}`: {name} has no option `{key}`", f"{hint}options of {name}: {', '.join(kind.options)}")
        if key in options:
            raise UsageError(f"`{text}`: option `{key}` is given twice", "give it once")
        options[key] = value
    if len(targets) != 1:
        raise UsageError(f"`{text}`: found {len(targets)} targets, {name} takes one", f"for example {kind.example}")
    spec = EvalSpec(text, name, tuple(targets), options)
    if not spec.column or _UNNAMEABLE.search(spec.column):
        raise UsageError(f"`{text}`: `{spec.column}` cannot be a column", "choose a name without / \\ or line breaks: name=…")
    return spec


def build(spec: EvalSpec | str, *, limit: int | None = None, seed: int = 0) -> Evaluator:
    """The evaluator that `spec` names, its data read and checked.

    Args:
        limit: at most so many items, drawn with `seed`.

    Raises:
        UsageError: an option's value is wrong.
        EvaluatorError: the data file or the function is wrong.
    """
    spec = parse(spec) if isinstance(spec, str) else spec
    if limit is not None and limit < 1:
        raise UsageError(f"a limit of {limit} items", "give at least 1")
    return _KINDS[spec.name].build(spec, limit, seed)


def _perplexity(spec: EvalSpec, limit: int | None, seed: int) -> Evaluator:
    window = _count(spec, "window", 512, least=2)
    return Perplexity(
        spec.column,
        read_file(spec.target),
        window=window,
        stride=_count(spec, "stride", max(1, window // 2), least=1),
        split=_word(spec, "split", ("none", "blank")),
        limit=limit,
        seed=seed,
    )


def _icl(spec: EvalSpec, limit: int | None, seed: int) -> Evaluator:
    _word(spec, "mode", ("cloze",))
    escapes = {"n": "\n", "t": "\t", "\\": "\\"}
    return Icl(
        spec.column,
        read_file(spec.target),
        pool=read_file(spec.options["pool"]) if "pool" in spec.options else None,
        shots=_count(spec, "shots", 5, least=0),
        sep=re.sub(r"\\([nt\\])", lambda match: escapes[match[1]], spec.options.get("sep", "\n\n")),
        norm=_word(spec, "norm", ("character", "none")),
        limit=limit,
        seed=seed,
    )


def _python(spec: EvalSpec, limit: int | None, seed: int) -> Evaluator:
    return Function(spec.column, spec.target)


def _count(spec: EvalSpec, key: str, default: int, *, least: int) -> int:
    value = spec.options.get(key, str(default))
    if not re.fullmatch(r"[0-9]{1,9}", value) or int(value) < least:
        raise UsageError(f"`{spec.text}`: {key}={value}, expected a whole number from {least}", f"for example {key}={default}")
    return int(value)


def _word(spec: EvalSpec, key: str, words: tuple[str, ...]) -> str:
    value = spec.options.get(key, words[0])
    if value not in words:
        raise UsageError(f"`{spec.text}`: {key}={value} is not available", f"{key}: {', '.join(words)}")
    return value


@dataclass(frozen=True)
class _Kind:
    example: str
    options: tuple[str, ...]
    build: Callable[[EvalSpec, int | None, int], Evaluator]


_UNNAMEABLE = re.compile(r"[/\\\x00-\x1f\x7f\u0085\u2028\u2029]")
_KINDS = {
    "perplexity": _Kind("perplexity:FILE.txt,window=512,stride=256", ("window", "stride", "split", "name"), _perplexity),
    "icl": _Kind("icl:FILE.jsonl,shots=5,mode=cloze", ("shots", "mode", "pool", "sep", "norm", "name"), _icl),
    "python": _Kind("python:package.module:function", ("name",), _python),
}
EXAMPLES = {name: kind.example for name, kind in _KINDS.items()}
"""One worked EVAL string for each evaluator."""
