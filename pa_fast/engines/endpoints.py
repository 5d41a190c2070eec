"""The endpoint check: at λ = 0 and 1 the live model must be the base and the instruct model, to the last bit.

It catches wrong pairing, tying, derived tensors, dtypes and kernels in one test. Reference logits are computed by
plain copies of each side into the live memory, run through that side's own module: the same addresses, the same
batch, no kernel of ours and no pairing in between.
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

    from pa_fast.live.weights import LiveWeights

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


def reference_logits(loaded: Loaded, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Logits of each side as loaded, at the live dtype. Leaves the live tensors holding one of the sides."""

    made = {}
    # The instruct side runs through `module` itself, whose live tensors have every name that base's can have.
    for side, module, sources in (("base", loaded.reference, loaded.base), ("instruct", loaded.module, loaded.instruct)):
        _fill_(loaded, sources)
        if module is not loaded.module:
            for name, tensor in layout.named(module):
                if name in loaded.live:
                    tensor.data = loaded.live[name].data
        made[side] = _probed(module, ids)
    return made


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


def is_drawn(loaded: Loaded, side: str) -> bool:
    """Whether stochastic rounding moves a weight of `side`: one that the dtype of a merge cannot represent."""
    import torch

    sources = {"base": loaded.base, "instruct": loaded.instruct}[side]
    for name, live in loaded.live.items():
        source, dtype = sources[name], loaded.via.get(name, live.dtype)
        if source.dtype != dtype and not torch.equal(source.to(dtype).to(source.dtype), source):
            return True
    return False


def check_endpoints(module: torch.nn.Module, weights: LiveWeights, ids: torch.Tensor, expected: dict[str, torch.Tensor]) -> None:
    """Set λ = 1 and 0, those that are expected, and compare logits bit for bit; leaves λ = 0.

    Raises:
        EngineError: an endpoint's logits are not those of the model as loaded.
    """
    import torch

    for side, lam in (("instruct", 1.0), ("base", 0.0)):
        if side not in expected:
            continue
        weights.set_lambda(lam)
        found = _probed(module, ids)
        if not torch.equal(found, expected[side]) and not _same_nan(found, expected[side]):
            worst = float((found.float() - expected[side].float()).abs().max())
            raise EngineError(
                f"endpoint check failed: at λ = {lam:g} the logits are not those of the {side} model (off by up to {worst:.3g})",
                "wrong pairing, tying or a tensor derived from weights; please report the architecture",
            )
    if weights.lam != 0.0:
        weights.set_lambda(0.0)


def _same_nan(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal where finite, and non-finite in the same places: what can be asked of checkpoints with NaN weights."""
    import torch

    return bool(torch.equal(a.isnan(), b.isnan())) and bool(torch.equal(a.nan_to_num(), b.nan_to_num()))
