"""Experiment trackers: a sweep as one run of theirs, λ as the step, by their own clients."""

from __future__ import annotations

import hashlib
import os
import pathlib
from collections.abc import Mapping
from typing import Any, cast

from pa_fast.base import Lambda
from pa_fast.errors import MissingExtra, UsageError
from pa_fast.sweep.entry import JournalEntry
from pa_fast.sweep.results import SweepResult

PROJECT = "pa_fast"
STEPS = 10_000
"""Steps from λ = 0 to 1, for trackers that count steps in whole numbers."""


class Tracker:
    """Callbacks of `pa_fast.sweep`. The tracker's run begins with the first point, when the run
    folder is the sweep's; `close` ends it, also after an error."""

    def __init__(self, folder: pathlib.Path, config: Mapping[str, Any]):
        self.folder, self.config = folder, dict(config)
        self._is_open = False

    def on_score(self, entry: JournalEntry) -> None:
        if entry.score is None:
            return
        if not self._is_open:
            self._open()
            self._is_open = True
        details = {f"{entry.evaluator}/{k}": v for k, v in (entry.details or {}).items()}
        effective = entry.effective_lambda
        known = {} if effective is None else {"effective_lambda": effective}
        self._log(float(Lambda(entry.lam)), {entry.evaluator: entry.score, **details, **known})

    def on_end(self, result: SweepResult) -> None:
        if self._is_open:
            picture = result.out / "trajectory.png"
            self._conclude(result.answered(), picture if picture.exists() else None)

    def close(self) -> None:
        if self._is_open:
            self._close()
            self._is_open = False

    def _open(self) -> None:
        raise NotImplementedError

    def _log(self, lam: float, figures: dict[str, float]) -> None:
        raise NotImplementedError

    def _conclude(self, answer: Mapping[str, Any], picture: pathlib.Path | None) -> None:
        raise NotImplementedError

    def _close(self) -> None:
        raise NotImplementedError

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def key(self) -> str:
        """An id that is one for each run folder."""
        return hashlib.sha256(str(self.folder).encode()).hexdigest()[:16]


def tracker(kind: str, out: str | os.PathLike[str], config: Mapping[str, Any]) -> Tracker:
    """Return a tracker of a sweep, which is the same run of the tracker whenever it goes on.

    Args:
        kind: `wandb`, `trackio` or `tensorboard`. Where they write, and whether offline, is said by
            their own environment variables; TensorBoard's files go to `tensorboard` in the run
            folder.
        out: the run folder.
        config: what the tracker records of the sweep.

    Example:
        lm, out = pa_fast.load("base", "instruct"), "runs/x"
        wandb = pa_fast.trackers.tracker("wandb", out, {"base": "base"})
        pa_fast.sweep(lm, "0:1:0.1", "icl:tasks.jsonl", out, callbacks=[wandb])
        wandb.close()

    Raises:
        UsageError: there is no tracker of that name.
        MissingExtra: its client is not installed.
    """
    if kind not in TRACKERS:
        raise UsageError(f"tracker `{kind}` is not available", f"available: {', '.join(TRACKERS)}")
    folder = pathlib.Path(os.path.abspath(out))
    try:
        return TRACKERS[kind](folder, config)
    except ImportError as error:
        raise MissingExtra(
            f"the tracker `{kind}` needs a package that is not installed: {error.name}",
            f"pip install 'pa_fast[{kind}]'",
        ) from None


class WandB(Tracker):
    """Weights & Biases: figures over `lambda`; the answer is in the run's summary."""

    def __init__(self, folder: pathlib.Path, config: Mapping[str, Any]):
        import wandb

        super().__init__(folder, config)
        self._wandb, self._run = wandb, cast(Any, None)

    def _open(self) -> None:
        self._run = self._wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=self.name,
            id=self.key,
            resume="allow",
            config=self.config,
            dir=str(self.folder),
        )
        self._run.define_metric("lambda")
        self._run.define_metric("*", step_metric="lambda")

    def _log(self, lam: float, figures: dict[str, float]) -> None:
        self._run.log({"lambda": lam, **figures})

    def _conclude(self, answer: Mapping[str, Any], picture: pathlib.Path | None) -> None:
        self._run.summary.update({"answer": dict(answer)})
        if picture is not None:
            self._run.log({"trajectory": self._wandb.Image(str(picture))})

    def _close(self) -> None:
        self._run.finish()


class Trackio(Tracker):
    """Trackio: figures with λ as the step, in steps of 1/10,000; the answer as text."""

    def __init__(self, folder: pathlib.Path, config: Mapping[str, Any]):
        import trackio

        super().__init__(folder, config)
        self._trackio = trackio

    def _open(self) -> None:
        self._trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT),
            name=f"{self.name}-{self.key[:6]}",
            resume="allow",
            config=self.config,
        )

    def _log(self, lam: float, figures: dict[str, float]) -> None:
        self._trackio.log({"lambda": lam, **figures}, step=round(lam * STEPS))

    def _conclude(self, answer: Mapping[str, Any], picture: pathlib.Path | None) -> None:
        shown: dict[str, Any] = {"answer": self._trackio.Markdown(str(answer["sentence"]))}
        if picture is not None:
            shown["trajectory"] = self._trackio.Image(str(picture))
        self._trackio.log(shown)

    def _close(self) -> None:
        self._trackio.finish()


class TensorBoard(Tracker):
    """TensorBoard: figures with λ as the step, in steps of 1/10,000; the answer as text."""

    def __init__(self, folder: pathlib.Path, config: Mapping[str, Any]):
        from torch.utils.tensorboard import SummaryWriter

        super().__init__(folder, config)
        self._make, self._writer = SummaryWriter, cast(Any, None)

    def _open(self) -> None:
        self._writer = self._make(str(self.folder / "tensorboard"))
        rows = "\n".join(f"| {key} | `{value}` |" for key, value in self.config.items())
        self._writer.add_text("sweep", f"| | |\n| --- | --- |\n{rows}")

    def _log(self, lam: float, figures: dict[str, float]) -> None:
        for name, figure in figures.items():
            self._writer.add_scalar(name, figure, round(lam * STEPS))
        self._writer.flush()

    def _conclude(self, answer: Mapping[str, Any], picture: pathlib.Path | None) -> None:
        self._writer.add_text("answer", str(answer["sentence"]))
        if picture is not None:
            import matplotlib.image

            self._writer.add_image(
                "trajectory", matplotlib.image.imread(picture), dataformats="HWC"
            )

    def _close(self) -> None:
        self._writer.close()


TRACKERS: Mapping[str, type[Tracker]] = {
    "wandb": WandB,
    "trackio": Trackio,
    "tensorboard": TensorBoard,
}
