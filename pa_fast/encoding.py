"""Encoding of two checkpoints to a delta file, with a report of its loss; and export of a delta as
a LoRA folder."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pa_fast.base import Lambda
from pa_fast.checkpoint.folder import is_adapter, resolve
from pa_fast.checkpoint.pair import PairOptions
from pa_fast.errors import OutputError, PairError, UsageError
from pa_fast.evals.rows import read_file
from pa_fast.files import check_outside, path_of

if TYPE_CHECKING:
    import torch

    from pa_fast.stores.lora import Exported
    from pa_fast.stores.quality import QualityReport
    from pa_fast.stores.store import Store


def encode(
    base: str | Path,
    instruct: str | Path,
    out: str | Path,
    format: str | Store = "packed",
    *,
    dtype: str | torch.dtype = "auto",
    allow_nonfinite: bool = False,
    overwrite: bool = False,
    text: str | Path | None = None,
    one_sided: str | None = None,
    ignore_config: Iterable[str] = (),
    strip_prefix: str | Iterable[str] = (),
    **options: Any,
) -> QualityReport:
    """Write the delta between two checkpoints to the file `out`. With it `pa_fast.load` needs only
    the base.

    Args:
        base, instruct: local folders, or hub ids (`org/name@revision`). Instruct may be a LoRA
            folder of peft, whose factors are then kept as they are: format `lowrank` without
            options.
        format: `packed`, `sparse`, `lowrank` or `dense`; or a store with its options.
        dtype: live dtype of every float tensor; `auto` takes that of each in the instruct files.
        allow_nonfinite: let NaN and infinity in the weights pass.
        overwrite: replace an existing delta file.
        one_sided, ignore_config, strip_prefix: see `PairOptions`.
        text: a UTF-8 file: the report then compares the delta with the exact merge on it, at
            λ = 0.5 and 1.
        options: options of a format that is given by name: `range` of `packed`, the least and the
            largest λ (0 and 1 by default), and `layout`, see `PackedStore`; `select`, `density`,
            `scope` and `seed` of `sparse`, see `SparseStore`; `rank`, `energy`, `budget` (bytes)
            and `seed` of `lowrank`, see `LowRankStore`. None stands for the default.

    Example:
        report = pa_fast.encode("base", "instruct", "delta", "lowrank", rank=16)
        report.bytes, report.relative_error
        pa_fast.encode("base", "instruct", "delta", pa_fast.PackedStore(-0.2, 1.5))

    Cost: tensor by tensor; that of the store, and one more read of both sides for the report.

    Raises:
        UsageError: an unknown format, or an option that the format does not have.
        PaFastError: as `pa_fast.load`, and OutputError: the file exists, lies in a source, or
            cannot be written.
    """
    from pa_fast.engines import encoding
    from pa_fast.stores import registry
    from pa_fast.stores.lora import LoraStore
    from pa_fast.stores.quality import QualityMeter

    check_outside(path_of(out, "out"), (base, instruct))
    pairing = PairOptions.of("instruct", one_sided, ignore_config, strip_prefix)
    options = {name: value for name, value in options.items() if value is not None}
    folder = resolve(instruct)
    if is_adapter(folder):
        foreign = (
            [*options, *(["text"] if text is not None else [])]
            if format == LoraStore.name
            else [f"format {format}"]
        )
        if foreign:
            raise UsageError(
                f"{instruct} is a LoRA folder, which is encoded as it is, and `{foreign[0]}` was"
                " asked for",
                "write --format lowrank, without options",
            )
        return _adapter(
            base, folder, out, dtype, allow_nonfinite=allow_nonfinite, overwrite=overwrite
        )
    if text is not None:
        read_file(text)  # fails before the encoding
    measured = QualityMeter(registry.encoding(format, options))
    encoding.encode(
        base,
        instruct,
        out,
        measured.store,
        dtype,
        allow_nonfinite=allow_nonfinite,
        overwrite=overwrite,
        options=pairing,
    )
    report = measured.report()
    if text is None:
        return report
    from pa_fast.engines import scoring
    from pa_fast.engines.transformers import load
    from pa_fast.quality.reports import on_text

    alike: dict[str, Any] = {
        "ignore_config": pairing.ignore_config,
        "strip_prefix": pairing.strip_prefix,
    }
    exact = load(base, instruct, dtype=dtype, one_sided=one_sided, **alike)
    lossy = load(base, delta=out, **alike)
    window = min(512, scoring.positions(exact.model) or 512)
    return replace(report, text=on_text(exact, lossy, text, window=window, stride=window // 2))


def export_lora(
    delta: str | Path,
    base: str | Path,
    out: str | Path,
    lam: float | str = 1.0,
    *,
    partial: bool = False,
) -> Exported:
    """Write the low-rank delta file `delta` of `base` as a LoRA folder that peft loads, at λ =
    `lam`.

    Args:
        out: the folder to write, new or empty.
        partial: leave out and report tensors that a LoRA cannot hold, such as norms, instead of
            refusing.

    Example:
        exported = pa_fast.export_lora("delta", "base", "lora", 0.6, partial=True)
        exported.ranks, exported.left_out

    Raises:
        PaFastError: see `pa_fast.stores.lora.export`.
    """
    path_of(delta, "delta")
    check_outside(path_of(out, "out"), (base,))
    from pa_fast.checkpoint.reader import Checkpoint
    from pa_fast.engines.loading import one_side
    from pa_fast.live import opening
    from pa_fast.stores.lora import export

    expected = opening.description_of(delta).base.quick
    if next(Path(out).iterdir(), None) if Path(out).is_dir() else Path(out).exists():
        raise OutputError(
            f"{out} exists already, and is not an empty folder", "choose another --out"
        )
    with Checkpoint.open(resolve(base)) as checkpoint:
        if expected not in (None, fingerprint := checkpoint.quick_fingerprint()):
            raise PairError(
                f"{delta} was encoded from a base of quick fingerprint {expected}, {base} has"
                f" {fingerprint}",
                "give the base that the delta is for",
            )
        # peft looks for it from wherever it is started
        local = Path(base).expanduser()
        named = str(local.absolute() if local.is_dir() else base)
        return export(
            delta, one_side(checkpoint), out, Lambda(lam), base_model=named, partial=partial
        )


def _adapter(
    base: str | Path, folder: Path, out: str | Path, dtype: str | torch.dtype, **options: Any
) -> QualityReport:
    """Encode the factors in a LoRA folder, of which nothing is lost."""
    from pa_fast.checkpoint.reader import Checkpoint
    from pa_fast.engines import encoding
    from pa_fast.engines.loading import one_side
    from pa_fast.stores.lora import LoraStore, read
    from pa_fast.stores.quality import QualityMeter

    with Checkpoint.open(resolve(base)) as checkpoint:
        measured = QualityMeter(LoraStore(read(folder, one_side(checkpoint))))
    encoding.encode(base, base, out, measured.store, dtype, **options)
    report = measured.report()
    rows = tuple(replace(row, relative_error=0.0, energy=1.0) for row in report.tensors)
    return replace(
        report, relative_error=0.0, energy=1.0, mean_error=0.0, mean_energy=1.0, tensors=rows
    )
