"""The endpoint check: at λ = 0 and 1 the live model must be the base and the instruct model, to the last bit.

A model is a function of its tensors and of its configuration. So every tensor of the live model, by each of its own names, is
held against the one of that name in the side's own module, as transformers made it from the side's files and before any
pairing; `loading` has refused a pair whose modules differ in anything else. Equal bits give equal logits, which needs no
forward pass. Only of a model whose layers compute with factors beside the tensors are logits compared, at λ = 0: with those of
the base's own module, whose tensors are moved into the same memory by plain copies.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pa_kernels.cores import one_core, over_cores

from pa_fast.engines import layout
from pa_fast.engines.loading import Loaded
from pa_fast.errors import EngineError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from pa_fast.live.ends import Ends

_PROMPTS, _LENGTH = 2, 16
_PIECE = 1 << 22
# 0.6 GB of bf16 on 2 busy cores: a pass of 0.1 s of processor on one, 1.0 on both; a core streams about 7 GB/s
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
        live, source, via = at
        with torch.no_grad():
            live.copy_(source.to(via))

    whole = [(live, sources[name], loaded.via.get(name, live.dtype)) for name, live in loaded.live.items()]
    if any(live.device.type != "cpu" for live, *_ in whole):
        for at in whole:
            copy(at)
        return
    flat = ((live.view(-1).split(_PIECE), source.view(-1).split(_PIECE), via) for live, source, via in whole)
    over_cores(copy, ((w, s, via) for lives, pieces, via in flat for w, s in zip(lives, pieces)))


def _probed(module: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Logits of the check's few tokens: a small model's on one core, where no thread waits for another at every layer."""
    if ids.device.type == "cpu" and sum(p.nbytes for p in module.parameters()) <= _ONE_CORE_BYTES:
        with one_core():
            return logits(module, ids)
    return logits(module, ids)


def ends(loaded: Loaded, lossless: bool, drawn: bool) -> tuple[Ends, list[str]]:
    """What the live tensors must be at λ = 0 and, where the store is lossless, 1; and what is left out, in words.

    Args:
        drawn: whether weights are rounded stochastically: a side that this moves is left out.
    """
    held: dict[float, Mapping[str, torch.Tensor]] = {}
    notes = []
    for lam, side in ((0.0, "base"), (1.0, "instruct")):
        if drawn and _is_drawn(loaded, side):
            notes.append(f"the {side} model is rounded stochastically: the live tensors were not compared with it as loaded")
        elif lossless or side == "base":
            held[lam] = loaded.ends[side]
    return held, notes


def check_logits(module: torch.nn.Module, ids: torch.Tensor, expected: torch.Tensor) -> None:
    """Compare the logits of a model at λ = 0 with those of the base, bit for bit.

    Raises:
        EngineError: they differ.
    """
    import torch

    found = _probed(module, ids)
    if not torch.equal(found, expected) and not _same_nan(found, expected):
        worst = float((found.float() - expected.float()).abs().max())
        raise EngineError(
            f"endpoint check failed: at λ = 0 the logits are not those of the base model (off by up to {worst:.3g})",
            "wrong pairing, tying or a tensor derived from weights; please report the architecture",
        )


def _is_drawn(loaded: Loaded, side: str) -> bool:
    """Whether stochastic rounding moves a weight of `side`: one that the dtype of a merge cannot represent."""
    import torch

    sources = {"base": loaded.base, "instruct": loaded.instruct}[side]
    for name, live in loaded.live.items():
        source, dtype = sources[name], loaded.via.get(name, live.dtype)
        if source.dtype != dtype and not torch.equal(source.to(dtype).to(source.dtype), source):
            return True
    return False


def _same_nan(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal where finite, and non-finite in the same places: what can be asked of checkpoints with NaN weights."""
    import torch

    return bool(torch.equal(a.isnan(), b.isnan())) and bool(torch.equal(a.nan_to_num(), b.nan_to_num()))
