"""The packed switch on a CPU: by one look-up a weight, or of few weights, where a table costs more,
by the pair behind each."""

from __future__ import annotations

import torch
from torch import Tensor

from pa_kernels import reference
from pa_kernels.lerp import lerp_piece_, torch_lerp_is_exact
from pa_kernels.packed_pairs import sources, table
from pa_kernels.packed_tensor import PackedTensor
from pa_kernels.reference import MANTISSA
from pa_kernels.scratch import Scratch

Kind = tuple[int, torch.dtype, float, float]
"""Width of codes, dtype, λ before and after."""

_scratch = Scratch()


class Way:
    """From λ to λ′ in codes of one width and dtype.

    Attributes:
        steps: bits(W(λ′)) − bits(W(λ)) by what stands below W(λ)'s leading one and by code: int16
            [2ʰ · codes], flat; None if not `tabled`. A pair, its merges and their roundings keep
            their proportions when both are doubled, so the exponent does not matter, and a pair
            that lies across powers of two is like any other. (They do not where a merge lies under
            the smallest normal number, which is why such pairs have no code.) Of 16-bit codes those
            of small |k| alone are in it: a table has to stay in a core's cache.
    """

    def __init__(self, width: int, dtype: torch.dtype, old: float, new: float, *, tabled: bool):
        self.dtype, self.old, self.new = dtype, old, new
        self._table = table(width, dtype, old)
        self.columns = 1 << (10 if width == 16 and dtype == torch.bfloat16 else 8)
        self.steps: Tensor | None = None
        if tabled:
            one = int(torch.ones(1, dtype=dtype, device="cpu").view(torch.int16))
            rows = 1 << MANTISSA[dtype]
            w = (
                torch.arange(one, one + rows, device="cpu")
                .to(torch.int16)
                .repeat_interleave(self.columns)
            )
            codes = (
                torch.arange(-self.columns // 2, self.columns // 2, device="cpu")
                .to(torch.int16)
                .repeat(rows)
            )
            self.steps = self.stepped(w, codes)

    def stepped(self, w: Tensor, codes: Tensor) -> Tensor:
        """bits(W(λ′)) − bits(W(λ)) of patterns w of W(λ); 0 where codes say that both sides are
        equal."""
        b, i, moves = sources(w, codes, self._table, self.dtype, self.old)
        return (
            merged(b.view(self.dtype), i.view(self.dtype), self.new).view(torch.int16) - w
        ) & moves


def switch_piece_(live: Tensor, entry: PackedTensor, piece: slice, way: Way) -> None:
    """Switch a piece of a CPU tensor."""
    w, codes = live.view(torch.int16), entry.element_codes(piece)
    if way.steps is None:
        w += way.stepped(w, codes)
    else:
        near, places = codes, _scratch.take("places", w.numel(), torch.int32)
        far = None
        if entry.width == 16:
            near = _scratch.take("near", w.numel(), torch.int16)
            torch.clamp(codes, -way.columns // 2, way.columns // 2 - 1, out=near)
            far = (codes ^ near).nonzero().view(-1)
        places.copy_(w)
        places &= (1 << MANTISSA[entry.dtype]) - 1
        places *= way.columns
        places += near
        places += way.columns // 2
        steps = torch.index_select(way.steps, 0, places)
        if far is not None and far.numel():
            steps[far] = way.stepped(w[far], codes[far])
        w += steps
    positions, base, target = entry.exceptions(piece)
    values = torch.empty_like(base)
    lerp_piece_(values, base, target, way.new, None)
    w.index_copy_(0, positions, values.view(torch.int16))


def merged(b: Tensor, i: Tensor, lam: float) -> Tensor:
    """`reference.lerp` where both are finite and not −0; a side itself, or written over base."""
    if lam in (0.0, 1.0):
        return i if lam else b
    return (
        torch.lerp(b, i, lam, out=b) if torch_lerp_is_exact(b.dtype) else reference.lerp(b, i, lam)
    )
