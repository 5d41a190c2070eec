"""run.json: the identity of a sweep, by which another sweep in its folder is refused."""

from __future__ import annotations

import json
import os
import pathlib
import shlex
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from pa_fast import files
from pa_fast.base import CompleteEngine, CompleteEvaluator, Lambda
from pa_fast.errors import OutputError, RunError, UsageError
from pa_fast.foreign import is_deep

if TYPE_CHECKING:
    from pa_fast.sweep.schedule import Schedule

NAME = "run.json"
FORMAT = 1
_OTHER = "choose another --out, or start afresh with --overwrite"
_SHOWN = 6
_CHECKSUM = "checksum"
"""Key of the version of checksums in an engine's identity. Without it they are of version 1."""
_SUMMED = frozenset({_CHECKSUM, "base_content", "instruct_content"})
"""Keys of an engine's identity whose values depend on that version."""


@dataclass(frozen=True)
class EvaluatorRecord:
    """One evaluator of a run: its name in every results file, the direction of its score, and its
    identity."""

    name: str
    higher_is_better: bool
    identity: Mapping[str, Any]


@dataclass(frozen=True)
class Manifest:
    """A run's identity and schedule. λ and evaluators are in order of first appearance; `versions`
    and `configurations` have every distinct set of package versions, and of folders and device;
    `commands` every distinct command line with its folder; `objective` and `keep` are the question
    that the last sweep in the folder was to answer."""

    lambdas: tuple[str, ...]
    evaluators: tuple[EvaluatorRecord, ...]
    engine: Mapping[str, Any]
    versions: tuple[Mapping[str, str], ...]
    configurations: tuple[Mapping[str, Any], ...]
    commands: tuple[Mapping[str, Any], ...] = ()
    objective: str | None = None
    keep: Mapping[str, float] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        document: dict[str, Any] = {
            "format": FORMAT,
            "lambdas": list(self.lambdas),
            "evaluators": [vars(column) for column in self.evaluators],
            "engine": self.engine,
            "versions": list(self.versions),
            "configurations": list(self.configurations),
            "commands": list(self.commands),
        }
        document |= {} if self.objective is None else {"objective": self.objective}
        document |= {"keep": dict(self.keep)} if self.keep else {}
        return (json.dumps(document, indent=2) + "\n").encode()


def describe(
    engine: CompleteEngine, schedule: Schedule, evaluators: Sequence[CompleteEvaluator]
) -> Manifest:
    """Return the manifest of a sweep that starts now, in this process.

    Raises:
        UsageError: an identity that JSON cannot hold.
    """
    return Manifest(
        tuple(lam.key for lam in schedule.points),
        tuple(
            EvaluatorRecord(
                e.name, bool(e.higher_is_better), _plain(f"evaluator `{e.name}`", e.identity)
            )
            for e in evaluators
        ),
        _plain("the engine", _identity(engine)),
        (_versions(),),
        (_plain("the engine", engine.configuration),),
        objective=schedule.objective,
        keep=schedule.keep,
    )


def _identity(engine: CompleteEngine) -> Mapping[str, Any]:
    """Return the engine's identity, with the rule that its weights follow now instead of the one at
    its creation."""
    rule = engine.weights.followed
    known = {key: value for key, value in engine.identity.items() if key != "rule"}
    return known if rule is None else {**known, "rule": rule.document()}


def has_other_checksums(recorded: Manifest, now: Manifest) -> bool:
    """Return whether `recorded` may be of the engine of `now`, but of a version with other
    checksums: they cannot be compared."""
    if _CHECKSUM not in now.engine or recorded.engine.get(_CHECKSUM, 1) == now.engine[_CHECKSUM]:
        return False
    known, others = (
        {key: value for key, value in engine.items() if key not in _SUMMED}
        for engine in (recorded.engine, now.engine)
    )
    return not list(_differences("engine", known, others))


def reconcile(
    folder: pathlib.Path, now: Manifest, finished: Collection[str] | None = None
) -> Manifest:
    """Write `now` to `folder`, or extend the manifest that is there with its λ and evaluators.

    Args:
        finished: evaluators that have a finished point; None: all have. Others may change their
            identity, and are dropped if they are not in `now`.

    Raises:
        RunError: the folder's engine, or an evaluator of the same name, has another identity; it
            names what differs.
    """
    if (folder / NAME).exists():
        recorded = load(folder)
        if has_other_checksums(recorded, now):
            if finished is None or finished:
                raise RunError(
                    f"{folder} was recorded with checksums of version"
                    f" {json.dumps(recorded.engine.get(_CHECKSUM, 1))}, and this pa_fast computes"
                    f" version {now.engine[_CHECKSUM]}: whether the weights are the same cannot be"
                    " told",
                    "finish the run with the pa_fast that began it, see `versions` in its"
                    f" {NAME}; or choose another --out, or start afresh with --overwrite",
                )
            recorded = replace(recorded, engine=now.engine)
        if finished is not None:
            requested = {column.name for column in now.evaluators}
            kept = [c for c in recorded.evaluators if c.name in finished or c.name in requested]
            fresh = {c.name: c for c in now.evaluators if c.name not in finished}
            recorded = replace(recorded, evaluators=tuple(fresh.get(c.name, c) for c in kept))
        now = _extended(recorded, now, folder)
    content = now.to_bytes()
    if not (folder / NAME).exists() or (folder / NAME).read_bytes() != content:
        files.write(folder / NAME, content)
    return now


def is_recorded(folder: pathlib.Path) -> bool:
    """Return whether `folder` has a run.json that a sweep wrote, of any format."""
    try:
        document = json.loads(files.read_own(folder / NAME))
    except (OSError, ValueError, RecursionError, OutputError):
        return False
    return isinstance(document, dict) and document.keys() >= {
        "format",
        "lambdas",
        "evaluators",
        "engine",
    }


def load(folder: pathlib.Path) -> Manifest:
    """Return the manifest in `folder`.

    Raises:
        RunError: missing, damaged, or of a later format.
    """
    path = folder / NAME
    try:
        document = json.loads(files.read_own(path))
        if is_deep(document):
            raise ValueError("nested too deep")
        if isinstance(document, dict) and not document.keys() & {"lambdas", "evaluators", "engine"}:
            raise RunError(
                f"{folder} is not a run folder: its {NAME} is no sweep's", "choose another --out"
            )
        if document["format"] != FORMAT:
            recorded_format = json.dumps(document["format"])
            raise RunError(
                f"{path} has format {recorded_format}, and this version reads {FORMAT}",
                "use the version that wrote it, or another --out",
            )
        return Manifest(
            tuple(Lambda(_typed(key, str)).key for key in document["lambdas"]),
            tuple(
                EvaluatorRecord(
                    _name(c["name"]),
                    _typed(c["higher_is_better"], bool),
                    _typed(c["identity"], dict),
                )
                for c in document["evaluators"]
            ),
            _typed(document["engine"], dict),
            tuple(_typed(versions, dict) for versions in document["versions"]),
            tuple(_typed(resolved, dict) for resolved in document["configurations"]),
            tuple(_typed(command, dict) for command in document.get("commands", [])),
            None if "objective" not in document else _name(document["objective"]),
            {_name(key): _share(share) for key, share in document.get("keep", {}).items()},
        )
    except FileNotFoundError:
        raise RunError(
            f"{folder} is not a run folder: it has no {NAME}", "name the --out of a sweep"
        ) from None
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, RecursionError, UsageError) as error:
        raise RunError(
            f"{path} is damaged: {error}", "restore it from a copy, or choose another --out"
        ) from error


def _extended(recorded: Manifest, now: Manifest, folder: pathlib.Path) -> Manifest:
    differences = list(_differences("engine", recorded.engine, now.engine))
    columns = {column.name: column for column in recorded.evaluators}
    for column in now.evaluators:
        if column.name in columns:
            before = columns[column.name]
            where = f"evaluator `{column.name}`"
            differences += _differences(where, before.identity, column.identity)
            differences += _differences(
                f"{where}.higher_is_better", before.higher_is_better, column.higher_is_better
            )
    if differences:
        more = [f"and {len(differences) - _SHOWN} more"] if len(differences) > _SHOWN else []
        listed = "".join(f"\n  {line}" for line in differences[:_SHOWN] + more)
        raise RunError(f"{folder} belongs to another sweep:{listed}", _OTHER)
    return Manifest(
        tuple(dict.fromkeys(recorded.lambdas + now.lambdas)),
        recorded.evaluators
        + tuple(column for column in now.evaluators if column.name not in columns),
        recorded.engine,
        recorded.versions + tuple(v for v in now.versions if v not in recorded.versions),
        recorded.configurations
        + tuple(c for c in now.configurations if c not in recorded.configurations),
        recorded.commands + tuple(c for c in now.commands if c not in recorded.commands),
        now.objective,
        now.keep,
    )


_ABSENT = object()


def _differences(where: str, recorded: object, now: object) -> Iterator[str]:
    if isinstance(recorded, Mapping) and isinstance(now, Mapping):
        for key in dict.fromkeys([*recorded, *now]):
            yield from _differences(
                f"{where}.{key}", recorded.get(key, _ABSENT), now.get(key, _ABSENT)
            )
    elif type(recorded) is not type(now) or recorded != now:
        yield f"{where}: recorded {_shown(recorded)}, now {_shown(now)}"


def _shown(value: object) -> str:
    text = "nothing" if value is _ABSENT else json.dumps(value)
    return text if len(text) <= 100 else text[:100] + "…"


def _plain(owner: str, value: Mapping[str, Any]) -> dict[str, Any]:
    """Return `value` as JSON reads it back, so that a tuple equals the list that it becomes."""
    try:
        plain = json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(
            f"the identity of {owner} cannot be recorded: {error}",
            "keep to JSON values: texts, numbers, lists, mappings",
        ) from error
    return _typed(plain, dict)


def _typed(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"{_shown(value)} where a {kind.__name__} is expected")
    return value


def _name(value: Any) -> str:
    """Return the name of an evaluator, checked to be a valid column of results files."""
    if not _typed(value, str).isprintable():
        raise ValueError(f"an evaluator is called {_shown(value)}")
    return str(value)


def _share(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
        raise ValueError(f"a share to keep is {_shown(value)}")
    return float(value)


def command() -> Mapping[str, Any]:
    """Return the command line of this process, as a shell takes it, and the folder of its relative
    paths."""
    program, *arguments = sys.argv or [""]
    return {"command": shlex.join([pathlib.Path(program).name, *arguments]), "folder": os.getcwd()}


def _versions() -> dict[str, str]:
    """Return the versions of packages that can change a score, as far as this process has imported
    them."""
    modules = {
        name: sys.modules.get(name)
        for name in ("pa_fast", "torch", "triton", "transformers", "numpy")
    }
    versions = {name: getattr(module, "__version__", None) for name, module in modules.items()}
    return {
        "python": sys.version.split()[0],
        **{name: str(version) for name, version in versions.items() if version is not None},
    }
