"""The size of a pair's delta by layer and module, kept in a run folder for its report."""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from pa_fast import files
from pa_fast.checkpoint.folder import resolve
from pa_fast.checkpoint.reader import Checkpoint
from pa_fast.errors import OutputError, RunError, UsageError
from pa_fast.sweep import journal, manifest

if TYPE_CHECKING:
    from pa_fast.checkpoint.inspect import PairReport
    from pa_fast.checkpoint.measure import MeasuredPart

_FORMAT = 1


@dataclass(frozen=True)
class PartSize:
    """‖I − B‖ / ‖B‖ of the tensors of one module in one layer; `layer` is None outside layers."""

    module: str
    layer: int | None
    norm: float


@dataclass(frozen=True)
class DeltaSizes:
    """Sizes of a pair's parts, in the order of its files, by quick fingerprints of both sides."""

    base: str
    instruct: str
    is_sampled: bool
    parts: tuple[PartSize, ...]

    @classmethod
    def of(cls, report: PairReport) -> DeltaSizes:
        """Return the sizes of a measured pair; modules in layers have short names.

        Raises:
            UsageError: its weights were not measured.
        """
        from pa_fast.checkpoint.measure import joint_norm, short_names

        if report.measured is None:
            raise UsageError("no difference was measured", "measure one: --sample or --full")
        groups: dict[tuple[str, int | None], list[MeasuredPart]] = {}
        for tensor in report.measured.tensors:
            groups.setdefault((tensor.module, tensor.layer), []).append(tensor)
        layered = {module for module, layer in groups if layer is not None}
        names = short_names((module for module, _ in groups), layered)
        norms = {group: joint_norm(tensors) for group, tensors in groups.items()}
        parts = tuple(
            PartSize(names[module], layer, norm)
            for (module, layer), norm in norms.items()
            if norm is not None
        )
        base, instruct = (str(one.quick_fingerprint) for one in (report.base, report.instruct))
        return cls(base, instruct, report.measured.is_sampled, parts)


def check_run(folder: pathlib.Path, base: str, instruct: str) -> None:
    """Check that `folder` is a run of the pair `base` and `instruct`, folders or hub ids, and may
    be written, before its weights are measured.

    Raises:
        RunError: `folder` is no run, or one of another pair.
        OutputError: it cannot be written.
        CheckpointError: a side is no checkpoint.

    Cost: that of two quick fingerprints.
    """
    engine = manifest.load(folder).engine
    if str(engine.get("instruct")).startswith("delta "):
        raise RunError(
            f"{folder} is the run of a delta file, expected one of two checkpoints",
            "the page of a run shows the pair that was swept: inspect this one without a run",
        )
    for side, where in (("base", base), ("instruct", instruct)):
        with Checkpoint.open(resolve(where)) as checkpoint:
            _check_side(folder, engine, side, where, checkpoint.quick_fingerprint())
    with files.locked(folder / journal.LOCK):
        pass


def _check_side(
    folder: pathlib.Path, engine: Mapping[str, object], side: str, where: str, fingerprint: str
) -> None:
    expected = engine.get(side)
    if fingerprint != expected:
        raise RunError(
            f"{folder} is the run of another pair: its {side} has the quick fingerprint"
            f" {expected}, {where} has {fingerprint}",
            "name the pair that was swept: `configurations` of run.json has its folders",
        )


def keep(report: PairReport, folder: pathlib.Path) -> None:
    """Write `pair.json` of a measured pair into the run folder whose pair it is.

    Raises:
        UsageError: its weights were not measured.
        RunError: `folder` is no run, or one of another pair.
        OutputError: it cannot be written.
    """
    sizes, engine = DeltaSizes.of(report), manifest.load(folder).engine
    _check_side(folder, engine, "base", report.base.folder, sizes.base)
    _check_side(folder, engine, "instruct", report.instruct.folder, sizes.instruct)
    text = json.dumps({"format": _FORMAT, **asdict(sizes)}, indent=1, ensure_ascii=False)
    with files.locked(folder / journal.LOCK):
        files.write(folder / journal.PAIR, f"{text}\n".encode())


def load(folder: pathlib.Path) -> DeltaSizes | None:
    """Return the sizes that are kept in a run folder; None where there are none, or the file is not
    what `keep` writes."""
    try:
        document = json.loads(files.read_own(folder / journal.PAIR))
        if document["format"] != _FORMAT:
            return None
        parts = tuple(_part(**part) for part in document["parts"])
        return DeltaSizes(
            str(document["base"]), str(document["instruct"]), bool(document["is_sampled"]), parts
        )
    except (OSError, OutputError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _part(module: object, layer: object, norm: object) -> PartSize:
    if not (layer is None or type(layer) is int) or not isinstance(norm, (int, float)):
        raise ValueError("no size of a part")
    if not 0 <= norm < math.inf:
        raise ValueError("no size of a part")
    return PartSize(str(module), layer, float(norm))
