"""The endpoint check: at λ = 0 and 1 the live model must be the base and the instruct model, to the
last bit.

A model is a function of its tensors and of its configuration. So every tensor of the live model, by
each of its names, is compared with the one of that name in the side's own module, as transformers
made it from the side's files and before any pairing; `loading` refuses a pair whose modules differ
in anything else. Equal bits give equal logits, so no forward pass is needed. Only a model whose
layers compute with factors beside the tensors has its logits compared, at λ = 0, with those of the
base's own module, whose tensors are copied into the same memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pa_kernels.cores import one_core, parallel_map

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
    """Return two fixed sequences of 16 token ids below `vocabulary`, spread over all of it."""
    import torch

    count = _PROMPTS * _LENGTH
    ids = [(2654435761 * (k + 1)) % 2**32 * vocabulary >> 32 for k in range(count)]
    return torch.tensor(ids, device=device).view(_PROMPTS, _LENGTH)


def logits(module: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    import torch

    with torch.no_grad():
        return module(input_ids=ids, use_cache=False).logits


def try_out(module: PreTrainedModel) -> None:
    """Run one short forward pass, for models that fail only there."""
    _probed(module, prompts(module.get_input_embeddings().weight.shape[0], module.device))


def base_logits(loaded: Loaded, ids: torch.Tensor) -> torch.Tensor:
    """Return the logits of the base as loaded, at the live dtype. Leaves the live tensors holding
    the base."""
    _fill_(loaded, loaded.base)
    for name, tensor in layout.named_tensors(loaded.reference):
        if name in loaded.live:
            tensor.data = loaded.live[name].data
    return _probed(loaded.reference, ids)


def _fill_(loaded: Loaded, sources: Mapping[str, torch.Tensor]) -> None:
    """Copy `sources` into the live tensors; on a CPU one core per piece."""
    import torch

    def copy(piece: tuple[torch.Tensor, torch.Tensor, torch.dtype]) -> None:
        live, source, between = piece
        with torch.no_grad():
            live.copy_(source.to(between))

    pieces = [
        (w, s, loaded.intermediate_dtype.get(name, live.dtype))
        for name, live in loaded.live.items()
        for w, s in zip(live.view(-1).split(_PIECE), sources[name].view(-1).split(_PIECE))
    ]
    if pieces:
        parallel_map(copy, pieces, pieces[0][0])


def _probed(module: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Return the logits of the check's few tokens; of a small model on one core, where no thread
    waits for another at every layer."""
    if ids.device.type == "cpu" and sum(p.nbytes for p in module.parameters()) <= _ONE_CORE_BYTES:
        with one_core():
            return logits(module, ids)
    return logits(module, ids)


@dataclass(frozen=True)
class EndpointCheck:
    """The tensors or logits that a live model must have at its endpoints.

    Attributes:
        endpoints: what the live tensors must be at λ = 0 and, where the store is lossless, 1. None
            for a model with attached factors.
        logits: for such a model, its logits at λ = 0 on `ids`.
        notes: which checks are left out, in words.
    """

    endpoints: Endpoints | None = None
    logits: torch.Tensor | None = None
    ids: torch.Tensor | None = None
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, loaded: Loaded, options: LoadOptions) -> EndpointCheck:
        """Return the check of a pair that is loaded and allocated. With attached factors it leaves
        the live tensors holding the base.

        A side with weights that the dtype of a merge cannot represent is left out under stochastic
        rounding, which moves them.
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
        endpoints: dict[float, Mapping[str, torch.Tensor | FirstRows]] = {}
        notes = []
        for lam, side in ((0.0, "base"), (1.0, "instruct")):
            if options.rounding.is_stochastic and _is_rounded(loaded, side):
                notes.append(
                    f"the {side} model is rounded stochastically: the live tensors were not"
                    " compared with it as loaded"
                )
            elif options.lossless or side == "base":
                endpoints[lam] = {
                    name: endpoint
                    if endpoint.shape == loaded.live[name].shape
                    else FirstRows(endpoint)
                    for name, endpoint in loaded.endpoints[side].items()
                }
        return cls(endpoints, notes=tuple(notes))

    def check_logits(self, module: PreTrainedModel) -> None:
        """Compare the logits at λ = 0, bit for bit; does nothing where `logits` is None.

        Raises:
            EngineError: they differ.
        """
        import torch

        if self.logits is None or self.ids is None:
            return
        actual = _probed(module, self.ids)
        if not torch.equal(actual, self.logits) and not _is_same_but_nan(actual, self.logits):
            worst = float((actual.float() - self.logits.float()).abs().max())
            raise EngineError(
                "endpoint check failed: at λ = 0 the logits are not those of the base model (off"
                f" by up to {worst:.3g})",
                "wrong pairing, tying or a tensor derived from weights; please report the"
                " architecture",
            )


def _is_rounded(loaded: Loaded, side: str) -> bool:
    """Return whether stochastic rounding moves a weight of `side`: whether it has one that the
    dtype of a merge cannot represent."""
    import torch

    sources = {"base": loaded.base, "instruct": loaded.instruct}[side]
    for name, live in loaded.live.items():
        source, dtype = sources[name], loaded.intermediate_dtype.get(name, live.dtype)
        if source.dtype != dtype and not torch.equal(source.to(dtype).to(source.dtype), source):
            return True
    return False


def _is_same_but_nan(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Return whether `a` and `b` are equal apart from NaN, which both have at the same indices."""
    import torch

    return bool(torch.equal(a.isnan(), b.isnan())) and bool(
        torch.equal(a.nan_to_num(), b.nan_to_num())
    )
