"""The options of `load`, and the values by which a loaded pair is recognised."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pa_kernels.reference import CHECKSUM_VERSION

from pa_fast.checkpoint.config import HARMLESS
from pa_fast.checkpoint.pair import PairOptions
from pa_fast.checkpoint.reader import Checkpoint
from pa_fast.checkpoint.safetensors import torch_dtype
from pa_fast.checkpoint.streaming import dtype_name
from pa_fast.device import device_of
from pa_fast.engines.tokenizer import spelling
from pa_fast.errors import EngineError, UsageError
from pa_fast.files import path_of
from pa_fast.live import opening
from pa_fast.live.planner import RESIDENCIES
from pa_fast.rounding import Rounding
from pa_fast.rules import LambdaRule, RuleLike
from pa_fast.stores import registry
from pa_fast.stores.store import Store

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

_NEAREST = "use rounding nearest, or the whole pair in one process"


@dataclass(frozen=True)
class LoadOptions:
    """Options by which a pair is loaded. Make one with `LoadOptions.of`, which takes and checks the
    arguments of `load`.

    Attributes:
        device: of the live tensors.
        dtype: `auto`, or the live dtype of every float tensor.
        store: how the delta is held; chosen at loading if `auto` is true.
        residency: where, or `auto`.
        rounding, rule: as for `LiveWeights.bind` and `follow`.
        delta, description: the delta file that takes the place of instruct, and its description;
            None without one.
        pairing: how the sides are paired.
        tokenizer, batch_size, endpoint_check, allow_nonfinite, shared_prefix: as for `load`.
    """

    device: torch.device
    dtype: str
    store: Store
    auto: bool
    residency: str
    rounding: Rounding
    rule: LambdaRule | None
    delta: str | Path | None
    description: opening.Description | None
    pairing: PairOptions
    tokenizer: str | Path | None
    batch_size: int
    endpoint_check: bool
    allow_nonfinite: bool
    shared_prefix: bool

    @classmethod
    def of(
        cls,
        device: str = "auto",
        dtype: str | torch.dtype = "auto",
        store: str | Store = "auto",
        residency: str = "auto",
        *,
        delta: str | Path | None = None,
        rounding: str | Rounding = "nearest",
        seed: int | None = None,
        rule: RuleLike | None = None,
        tokenizer: str | Path | None = None,
        batch_size: int = 8,
        endpoint_check: bool = True,
        allow_nonfinite: bool = False,
        shared_prefix: bool = True,
        extra_rows: str = "instruct",
        one_sided: str | None = None,
        ignore_config: Iterable[str] = (),
        strip_prefix: str | Iterable[str] = (),
    ) -> LoadOptions:
        """Return the options, checked; reads the header of `delta`.

        Raises:
            UsageError: an option is unknown, or excludes another.
            CheckpointError: `delta` is none.
        """
        if delta is not None:
            path_of(delta, "delta")
        dtype = dtype_name(dtype)
        pairing = PairOptions.of(extra_rows, one_sided, ignore_config, strip_prefix)
        chosen, auto = registry.named(store), store == "auto"
        if delta is not None and (not (auto or chosen.attached) or dtype != "auto"):
            raise UsageError(
                "a delta file says by itself how it is held, and in which dtype",
                "leave out both; store attached alone fits",
            )
        return cls(
            device_of(device),
            dtype,
            chosen,
            auto,
            residency,
            Rounding.of(rounding, seed),
            None if rule is None else LambdaRule.of(rule),
            delta,
            None if delta is None else opening.description_of(delta),
            pairing,
            tokenizer,
            batch_size,
            endpoint_check,
            allow_nonfinite,
            shared_prefix,
        )._checked()

    @property
    def attached(self) -> bool:
        """True if factors are left beside the layers."""
        return self.store.attached

    @property
    def lossless(self) -> bool:
        """True if λ = 1 is the instruct model that is loaded."""
        return self.description is None and self.store.lossless

    @property
    def described(self) -> str:
        """The store of the delta in one line, as far as it is known before the pair is loaded."""
        if self.description is None:
            return self.store.describe()
        return (
            f"{self.description.options}, attached" if self.attached else self.description.options
        )

    def live_dtype(self) -> torch.dtype | None:
        """Return the live dtype of all float tensors, or None where it follows from the files.

        Raises:
            EngineError: the delta is for several, and transformers loads a model in one.
        """
        import torch

        if self.description is None:
            return None if self.dtype == "auto" else getattr(torch, self.dtype)
        live = {one.live for one in self.description.tensors.values()}
        narrow = live - {"F32"} or live  # transformers keeps the same tensors in fp32 again
        if len(narrow) != 1:
            raise EngineError(
                f"the delta is for live tensors of {', '.join(sorted(live)) or 'no dtype'}",
                "encode it with one dtype",
            )
        return torch_dtype(narrow.pop())

    def _checked(self) -> LoadOptions:
        """Return these options; raises UsageError where they exclude one another."""
        described = self.described
        known = RESIDENCIES if self.description is None else ("auto", "device")
        if self.residency not in known:
            raise UsageError(
                f"residency `{self.residency}` is not available", f"available: {', '.join(known)}"
            )
        if self.rounding.is_stochastic and self.description is not None:
            raise UsageError("stochastic rounding of a delta file", _NEAREST)
        if self.attached and self.rule is not None:
            raise UsageError(
                f"a λ rule for a delta that is held as `{described}`: its factors share one λ",
                "use another store",
            )
        return self

    def check_split(self) -> None:
        """Raise UsageError for options that a model split over processes cannot have."""
        if self.rounding.is_stochastic:
            raise UsageError(
                "stochastic rounding of a model that is split over processes", _NEAREST
            )
        if not self.lossless:
            raise UsageError(
                f"a model that is split over processes cannot be held as `{self.described}`",
                "use dense, or sparse exact",
            )


def identity(
    options: LoadOptions,
    base: Checkpoint,
    instruct: Checkpoint,
    store: str,
    tokenizer: PreTrainedTokenizerBase | None,
) -> dict[str, Any]:
    """Return names and values that must be equal for a sweep to be resumed.

    Args:
        store: how the delta is held in the end.
    """
    return {
        "engine": "transformers",
        "checksum": CHECKSUM_VERSION,
        **of_sides(base, instruct),
        **(
            {}
            if options.description is None
            else {"instruct": f"delta {options.description.fingerprint()}"}
        ),
        "store": store,
        "rounding": str(options.rounding),
        **({} if options.rule is None else {"rule": options.rule.document()}),
        "dtype": options.dtype,
        **of_tokenizer(tokenizer),
    }


def of_sides(base: Checkpoint, instruct: Checkpoint) -> dict[str, Any]:
    """Return the part of an engine's identity that says which two models it has."""
    return {
        "base": base.quick_fingerprint(),
        "instruct": instruct.quick_fingerprint(),
        "base_config": _configuration(base),
        "instruct_config": _configuration(instruct),
    }


def of_tokenizer(tokenizer: PreTrainedTokenizerBase | None) -> dict[str, Any]:
    """Return the part of an engine's identity that says how it reads and frames texts."""
    return {
        "tokenizer": _digest(spelling(tokenizer)),
        "chat_template": _digest(
            json.dumps(getattr(tokenizer, "chat_template", None), sort_keys=True)
        ),
    }


def _configuration(checkpoint: Checkpoint) -> str:
    """Return a digest of what config.json says about the function that the model computes."""
    return _digest(
        json.dumps(
            {k: v for k, v in checkpoint.config.items() if k not in HARMLESS}, sort_keys=True
        )
    )


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
