"""What a caller of `load` asks for, checked before any checkpoint is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pa_fast.checkpoint.safetensors import torch_dtype
from pa_fast.checkpoint.streaming import DTYPES
from pa_fast.errors import EngineError, UsageError
from pa_fast.files import path_of
from pa_fast.live import opening
from pa_fast.live.planner import RESIDENCIES, Store, planned
from pa_fast.rounding import Rounding
from pa_fast.rules import LambdaRule, RuleLike

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Asked:
    """The options of `load` that bear on one another.

    Attributes:
        device: of the live tensors.
        dtype: `auto`, or the live dtype of every float tensor.
        store: how the delta is to be held; `auto`: whether that was left open.
        residency: where, or `auto`.
        rounding, rule: as for `LiveWeights.bind` and `follow`.
        delta, about: the delta file that stands for instruct, and what it says of itself; None
            without one.
        sharding: what `from_pretrained` takes to split a model over processes; empty on one.
    """

    device: torch.device
    dtype: str
    store: Store
    auto: bool
    residency: str
    rounding: Rounding
    rule: LambdaRule | None
    delta: str | Path | None
    about: opening.Description | None
    sharding: Mapping[str, Any]

    @property
    def attached(self) -> bool:
        """Whether factors are left beside the layers."""
        return bool(getattr(self.store, "attached", False))

    @property
    def lossless(self) -> bool:
        """Whether λ = 1 is to be the instruct model that is loaded."""
        return self.about is None and self.store.lossless

    @property
    def described(self) -> str:
        """How the delta is to be held, in one line, as far as it is known before the pair is."""
        if self.about is None:
            return self.store.describe()
        return f"{self.about.options}, attached" if self.attached else self.about.options

    def live_dtype(self) -> torch.dtype | None:
        """That of all float tensors, or None where it follows from the files.

        Raises:
            EngineError: the delta is for several, and transformers loads a model in one.
        """
        import torch

        if self.about is None:
            return None if self.dtype == "auto" else getattr(torch, self.dtype)
        live = {one.live for one in self.about.tensors.values()}
        narrow = live - {"F32"} or live  # what transformers keeps in fp32 beside it, it keeps again
        if len(narrow) != 1:
            raise EngineError(
                f"the delta is for live tensors of {', '.join(sorted(live)) or 'no dtype'}",
                "encode it with one dtype",
            )
        return torch_dtype(narrow.pop())

    def check(self) -> Asked:
        """Raise UsageError where the options exclude one another; returns itself."""
        said = self.described
        for option, value, known in (
            (
                "residency",
                self.residency,
                RESIDENCIES if self.about is None else ("auto", "device"),
            ),
            ("dtype", self.dtype, ("auto", *DTYPES)),
        ):
            if value not in known:
                raise UsageError(
                    f"{option} `{value}` is not available", f"available: {', '.join(known)}"
                )
        if self.rounding.drawn and (self.sharding or self.about is not None):
            what = (
                "a delta file" if self.about is not None else "a model that is split over processes"
            )
            raise UsageError(
                f"stochastic rounding of {what}",
                "use rounding nearest, or the whole pair in one process",
            )
        if self.attached and self.rule is not None:
            raise UsageError(
                f"a λ rule for a delta that is held as `{said}`: its factors share one λ",
                "use another store",
            )
        if self.sharding and not self.lossless:
            raise UsageError(
                f"a model that is split over processes cannot be held as `{said}`",
                "use dense, or sparse exact",
            )
        return self


def asked(
    device: torch.device,
    dtype: str,
    store: str | Store,
    residency: str,
    rounding: Rounding,
    rule: RuleLike | None,
    instruct: str | Path | None,
    delta: str | Path | None,
    sharding: Mapping[str, Any],
) -> Asked:
    """The options as given, checked; reads the header of `delta`.

    Raises:
        UsageError: an option is unknown, or excludes another.
        CheckpointError: `delta` is none.
    """
    if delta is not None:
        path_of(delta, "delta")
    if (instruct is None) == (delta is None):
        raise UsageError(
            "one of an instruct model and a delta file is needed",
            "give the instruct folder, or delta= (--delta)",
        )
    if delta is not None and (store not in ("auto", "attached") or dtype != "auto"):
        raise UsageError(
            "a delta file says by itself how it is held, and in which dtype",
            "leave out both; store attached alone fits",
        )
    about = None if delta is None else opening.about(delta)
    ruled = None if rule is None else LambdaRule.of(rule)
    return Asked(
        device,
        dtype,
        planned(store),
        store == "auto",
        residency,
        rounding,
        ruled,
        delta,
        about,
        sharding,
    ).check()
