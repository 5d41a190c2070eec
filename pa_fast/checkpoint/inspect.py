"""A pair as `pa-fast inspect` reports it, from headers alone or from the weights."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pa_fast.base import Lambda
from pa_fast.checkpoint.config import Difference, is_tied_in_config
from pa_fast.checkpoint.folder import resolve
from pa_fast.checkpoint.pair import Pair, PairOptions, pair
from pa_fast.checkpoint.reader import Checkpoint
from pa_fast.checkpoint.streaming import MergeSpec, dtype_name, live_dtype
from pa_fast.errors import UsageError
from pa_fast.rounding import Rounding
from pa_fast.rules import RuleLike

if TYPE_CHECKING:
    import torch

    from pa_fast.checkpoint.measure import Measured


@dataclass(frozen=True)
class SideReport:
    """One checkpoint: its folder, weight bytes, shards and tensors per dtype; `quick_fingerprint`
    if weights were read."""

    folder: str
    bytes: int
    shards: int
    dtypes: dict[str, int]
    quick_fingerprint: str | None


@dataclass(frozen=True)
class PairReport:
    """A pair that can be merged. `parameters` counts elements that follow λ; `live_dtypes` counts
    tensors by live dtype; `measured` is the difference of the sides, if weights were read."""

    model_type: str
    tensors: int
    parameters: int
    tied: bool
    live_dtypes: dict[str, int]
    base: SideReport
    instruct: SideReport
    differences: tuple[Difference, ...]
    notes: tuple[str, ...]
    measured: Measured | None = None

    def to_json(self) -> str:
        """Return the fields of this class as one JSON document."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False, default=str)


def inspect(
    base: str | Path,
    instruct: str | Path,
    *,
    sample: bool = False,
    full: bool = False,
    fidelity: Iterable[Lambda | float | str] = (),
    dtype: str | torch.dtype = "auto",
    rounding: str | Rounding = "nearest",
    seed: int | None = None,
    rule: RuleLike | None = None,
    extra_rows: str = "instruct",
    one_sided: str | None = None,
    ignore_config: Iterable[str] = (),
    strip_prefix: str | Iterable[str] = (),
    progress: Callable[[int, int], None] | None = None,
) -> PairReport:
    """Pair two checkpoints and report what they are and, on request, how far apart they are.

    Args:
        base, instruct: folders or hub ids `org/name[@revision]`.
        sample: also measure 65,536 evenly placed weights of every tensor; see
            `pa_fast.checkpoint.measure`.
        full: also measure all weights.
        fidelity: a grid of λ (`pa_fast.lambdas("0:1:0.1")`): measure the effective λ of each at the
            live dtype, on a sample unless `full`.
        dtype: the live dtype, as for `merge`.
        rounding, seed, rule: for the λ of `fidelity`, as for `merge`.
        extra_rows, one_sided, ignore_config, strip_prefix: see `PairOptions`.
        progress: called with (bytes read, bytes in all) while weights are measured.

    Example:
        report = pa_fast.inspect("base", "instruct", sample=True)
        report.parameters, report.measured.total.relative_norm

    Cost: headers and JSON files. No weights are read, and torch is not imported unless the two
    config.json differ in a key that could change the model. With `sample` or `full` also those
    weights, and 4 KiB per tensor.

    Raises:
        CheckpointError: a folder is not a readable checkpoint.
        PairError: the two are not one model.
        DataError: measured weights are not finite, or a file changed meanwhile.
        UsageError: `sample` and `full` together; rounding or rule without `fidelity`; dtype, λ,
            rounding, seed, policy or rule is not valid; or the rule does not fit the names.
    """
    grid = [MergeSpec.of(lam, rounding, seed, rule) for lam in fidelity]
    options = PairOptions.of(extra_rows, one_sided, ignore_config, strip_prefix)
    dtype = dtype_name(dtype)
    if sample and full:
        raise UsageError(
            "--sample and --full together",
            "--full measures all weights, --sample some of each tensor",
        )
    if not grid and (rule is not None or Rounding.of(rounding, seed) != Rounding()):
        raise UsageError("rounding and rule of no λ", "say of which: --fidelity 0:1:0.1")
    with (
        Checkpoint.open(resolve(base)) as b,
        Checkpoint.open(resolve(instruct)) as i,
    ):
        paired = pair(b, i, options)
        more: dict[str, Any] = {"notes": paired.notes}
        weights = sample or full or bool(grid)
        if weights:
            from pa_fast.checkpoint.measure import measure
            from pa_fast.checkpoint.vocabulary import untrained_rows

            more["notes"] += untrained_rows(b, i)
            more["measured"] = measure(paired, dtype, grid, sample=not full, progress=progress)
        stated = is_tied_in_config(i.config)
        return PairReport(
            model_type=str(i.config.get("model_type", "unknown")),
            tensors=len(paired.names),
            parameters=sum(paired.count(name) for name in paired.names if paired.is_lerped(name)),
            tied=not paired.is_untied
            and (stated if stated is not None and not paired.tied else not _has_head(paired)),
            live_dtypes=dict(Counter(live_dtype(paired, name, dtype) for name in paired.names)),
            base=_side(b, weights),
            instruct=_side(i, weights),
            differences=paired.differences,
            **more,
        )


def _has_head(pair: Pair) -> bool:
    return any(name.endswith("lm_head.weight") for name in pair.names)


def _side(checkpoint: Checkpoint, weights: bool) -> SideReport:
    infos = list(checkpoint.tensors.values())
    return SideReport(
        folder=str(checkpoint.folder),
        bytes=sum(info.nbytes for info in infos),
        shards=len({info.file for info in infos}),
        dtypes=dict(Counter(info.dtype for info in infos)),
        quick_fingerprint=checkpoint.quick_fingerprint() if weights else None,
    )
