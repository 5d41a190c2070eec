"""The endpoint check: at λ = 0 and 1 the live model must be the base and the instruct model, to the
last bit.

A model is a function of its tensors and of its configuration. So every tensor of the live model, by
each of its own names, is held against the one of that name in the side's own module, as
transformers made it from the side's files and before any pairing; `loading` has refused a pair
whose modules differ in anything else. Equal bits give equal logits, which needs no forward pass.
Only of a model whose layers compute with factors beside the tensors are logits compared, at λ = 0:
with those of the base's own module, whose tensors are moved into the same memory by plain copies.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pa_kernels.cores import one_core, over

from pa_fast.engines import layout
from pa_fast.engines.loading import Loaded
from pa_fast.engines.options import LoadOptions
from pa_fast.errors import EngineError
from pa_fast.live.endpoints import FirstRows

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from pa_fast.live.endpoints import Endpoints

_PROMPTS, _LENGTH = 2, 16
_PIECE = 1 << 22
# 0.6 GB of bf16 on 2 busy cores: a pass of 0.1 s of processor on one, 1.0 on both; a core streams
# about 7 GB/s
_ONE_CORE_BYTES = 4 * 2**30


def prompts(vocabulary: int, device: torch.device) -> torch.Tensor:
    """Two fixed sequences of 16 token ids below `vocabulary`, spread over all of it."""
    import torch

    count = _PROMPTS * _LENGTH
    ids = [(2654435761 * (k + 1)) % 2**32 * vocabulary >> 32 for k in range(count)]
    return torch.tensor(ids, device=device).view(_PROMPTS, _LENGTH)


def logits(module: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    import torch

    with torch.no_grad():
        return module(input_ids=ids, use_cache=False).logits


def try_out(module: PreTrainedModel) -> None:
    """One short forward pass, for models of which only that shows whether they run."""
    _probed(module, prompts(module.get_input_embeddings().weight.shape[0], module.device))


def base_logits(loaded: Loaded, ids: torch.Tensor) -> torch.Tensor:
    """Logits of the base as loaded, at the live dtype. Leaves the live tensors holding it."""
    _fill_(loaded, loaded.base)
    for name, tensor in layout.named(loaded.reference):
        if name in loaded.live:
            tensor.data = loaded.live[name].data
    return _probed(loaded.reference, ids)


def _fill_(loaded: Loaded, sources: Mapping[str, torch.Tensor]) -> None:
    """Plain copies of `sources` into the live tensors; on a CPU one core per piece."""
    import torch

    def copy(at: tuple[torch.Tensor, torch.Tensor, torch.dtype]) -> None:
        live, source, between = at
        with torch.no_grad():
            live.copy_(source.to(between))

    pieces = [
        (w, s, loaded.intermediate_dtype.get(name, live.dtype))
        for name, live in loaded.live.items()
        for w, s in zip(live.view(-1).split(_PIECE), sources[name].view(-1).split(_PIECE))
    ]
    if pieces:
        over(copy, pieces, pieces[0][0])


def _probed(module: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Logits of the check's few tokens: a small model's on one core, where no thread waits for
    another at every layer."""
    if ids.device.type == "cpu" and sum(p.nbytes for p in module.parameters()) <= _ONE_CORE_BYTES:
        with one_core():
            return logits(module, ids)
    return logits(module, ids)


@dataclass(frozen=True)
class Proof:
    """What a live model is held against.

    Attributes:
        endpoints: what the live tensors must be at λ = 0 and, where the store is lossless, 1. None
            where that is not asked of tensors: of a model with attached factors.
        logits: what they must give instead at λ = 0 on `ids`.
        notes: what is left out, in words.
    """

    endpoints: Endpoints | None = None
    logits: torch.Tensor | None = None
    ids: torch.Tensor | None = None
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, loaded: Loaded, options: LoadOptions) -> Proof:
        """That of a pair that is loaded and allocated. Stochastic rounding moves a side whose dtype
        a merge cannot represent: nothing is asked of it. With attached factors it leaves the live
        tensors holding the base.
        """
        if options.attached:
            ids = prompts(
                min(
                    m.get_input_embeddings().weight.shape[0]
                    for m in (loaded.module, loaded.reference)
                ),
                options.device,
            )
            return cls(None, base_logits(loaded, ids), ids)
        ends: dict[float, Mapping[str, torch.Tensor | FirstRows]] = {}
        notes = []
        for lam, side in ((0.0, "base"), (1.0, "instruct")):
            if options.rounding.is_stochastic and _is_drawn(loaded, side):
                notes.append(
                    f"the {side} model is rounded stochastically: the live tensors were not"
                    " compared with it as loaded"
                )
            elif options.lossless or side == "base":
                ends[lam] = {
                    name: end if end.shape == loaded.live[name].shape else FirstRows(end)
                    for name, end in loaded.endpoints[side].items()
                }
        return cls(ends, notes=tuple(notes))

    def check_logits(self, module: PreTrainedModel) -> None:
        """Compare logits at λ = 0, bit for bit, where they are to be.

        Raises:
            EngineError: they differ.
        """
        import torch

        if self.logits is None or self.ids is None:
            return
        found = _probed(module, self.ids)
        if not torch.equal(found, self.logits) and not _same_nan(found, self.logits):
            worst = float((found.float() - self.logits.float()).abs().max())
            raise EngineError(
                "endpoint check failed: at λ = 0 the logits are not those of the base model (off"
                f" by up to {worst:.3g})",
                "wrong pairing, tying or a tensor derived from weights; please report the"
                " architecture",
            )


def _is_drawn(loaded: Loaded, side: str) -> bool:
    """Whether stochastic rounding moves a weight of `side`: one that the dtype of a merge cannot
    represent."""
    import torch

    sources = {"base": loaded.base, "instruct": loaded.instruct}[side]
    for name, live in loaded.live.items():
        source, dtype = sources[name], loaded.intermediate_dtype.get(name, live.dtype)
        if source.dtype != dtype and not torch.equal(source.to(dtype).to(source.dtype), source):
            return True
    return False


def _same_nan(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal where finite, and non-finite in the same places: what can be asked of checkpoints with
    NaN weights."""
    import torch

    return bool(torch.equal(a.isnan(), b.isnan())) and bool(
        torch.equal(a.nan_to_num(), b.nan_to_num())
    )
