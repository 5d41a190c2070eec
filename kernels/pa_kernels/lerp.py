"""The dense lerp: live tensors rewritten in place for any λ, with the bits of `reference.lerp` on
every device."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from pa_kernels import noise, reference
from pa_kernels.cores import inference, over_cores
from pa_kernels.reference import BITS, LIVE_DTYPES, Draw
from pa_kernels.switch import Group, Switch, one_for_each, refuse_flushed_denormals
from pa_kernels.tiles import INTERPRETED

CHUNK = 1 << 17
"""Elements per step of the CPU paths that touch a tensor more than once: its pieces stay in a
core's L2."""

STREAM = 1 << 24
"""Elements per step of the paths that touch it once: as fast as one flat torch.lerp over 0.44 G
bf16 weights on 2 quiet cores (98 % at 4 M). On busy cores torch's own split of every tensor over
its threads falls to 46 %, these pieces do not."""


class Lerp(Switch):
    """T live tensors with their sources, prepared once so that each λ costs one pass and nothing
    else.

    Args:
        out: live tensors, rewritten in place; contiguous bf16, fp16 or fp32.
        base, inst: the sources, same shapes, in any mix of these dtypes; on the live tensors'
            devices, for one on a GPU also in pinned host memory. They must not change afterwards,
            and no live tensor may overlap a source; neither is checked here.
        via: for each tensor the dtype that its result is rounded to before its own, or None.
        draws: for each tensor the noise of its first rounding, which is stochastic then, or None.

    Attributes:
        groups: one per (out, base, inst, via) dtype tuple, kind of rounding and GPU, and one for
            all CPU tensors. `group.lams` is the fp32 λ table in the group's own memory,
            `group.entries` says whose λ stands where.

    Numerics:
        Bit for bit `reference.lerp`, whatever λ came before.

    Cost:
        Preparing reads nothing. A switch reads both sources and writes the live tensors: 6 bytes
        per bf16 weight. On a CPU the first one between the endpoints goes in smaller steps.

    Raises:
        ValueError, TypeError: naming entry t and what was found and expected.
    """

    def __init__(
        self,
        out: Sequence[Tensor],
        base: Sequence[Tensor],
        inst: Sequence[Tensor],
        via: Sequence[torch.dtype | None] | None = None,
        draws: Sequence[Draw | None] | None = None,
    ):
        self.count = len(out)
        rows = _checked(out, base, inst, via, draws)
        on_cpu = [
            t for t, row in enumerate(rows) if row[0].device.type == "cpu" and not INTERPRETED
        ]
        self.groups: tuple[Group, ...] = (
            (_CpuGroup(on_cpu, [rows[t] for t in on_cpu]),) if on_cpu else ()
        )
        self.groups += tuple(_triton_groups(rows, sorted(set(range(self.count)) - set(on_cpu))))


def lerp_(
    out: Sequence[Tensor],
    base: Sequence[Tensor],
    inst: Sequence[Tensor],
    lam: float | Sequence[float],
    *,
    via: Sequence[torch.dtype | None] | None = None,
    draws: Sequence[Draw | None] | None = None,
) -> None:
    """Write W(λ) = lerp(base, inst, λ) into `out`, once; see `Lerp` for the arguments, and for many
    λ.

    On the CPU this prepares nothing: it goes over each tensor in pieces that stay in cache.
    """
    rows = _checked(out, base, inst, via, draws)
    if INTERPRETED or any(row[0].device.type != "cpu" for row in rows):
        Lerp(out, base, inst, via, draws).run_(lam)
        return
    refuse_flushed_denormals()
    lams = one_for_each(lam, len(rows))

    def write(at: tuple[int, slice]) -> None:
        t, piece = at
        with inference():
            _row_piece_(rows[t], piece, lams[t])

    # an endpoint is a copy: it needs no cache, and each piece costs a call
    steps = [
        STREAM if lam in (0.0, 1.0) and _is_single_pass(row, lam) else CHUNK
        for row, lam in zip(rows, lams)
    ]
    over_cores(
        write,
        [(t, piece) for t, (w, *_) in enumerate(rows) for piece in _pieces(w.numel(), steps[t])],
    )


Row = tuple[Tensor, Tensor, Tensor, "torch.dtype | None", "Draw | None"]
"""Live tensor, base, instruct (all flat and detached), the dtype to round to first, and the noise
of that rounding."""


class _CpuGroup:
    """All CPU tensors of a `Lerp`.

    Attributes:
        patches: by tensor, the pieces in which equal sources need more than torch.lerp. They are
            looked for by the first λ that asks it for that tensor, while a piece is in cache:
            looking for them apart would read the base once more.
    """

    def __init__(self, entries: Sequence[int], rows: Sequence[Row]):
        self.entries = tuple(entries)
        self.rows = rows
        self.lams = torch.zeros(len(rows), dtype=torch.float32, device="cpu")
        self.patches: dict[int, list[slice]] = {}

    def launch_(self) -> None:
        refuse_flushed_denormals()
        lams = self.lams.tolist()
        single = [_is_single_pass(row, lam) for row, lam in zip(self.rows, lams)]
        lerped = {t for t, lam in enumerate(lams) if single[t] and lam not in (0.0, 1.0)}
        new = lerped - self.patches.keys()
        found: list[tuple[int, slice]] = []

        def write(at: tuple[int, slice]) -> None:
            t, piece = at
            w, b, i, *_ = self.rows[t]
            with inference():
                if not single[t]:
                    _row_piece_(self.rows[t], piece, lams[t])
                elif t not in lerped:
                    w[piece].copy_((i if lams[t] else b)[piece])
                else:
                    torch.lerp(b[piece], i[piece], lams[t], out=w[piece])
                    if t in new and _needs_patch(b[piece], i[piece]):
                        found.append(at)

        sizes = [
            (t, w.numel(), STREAM if single[t] and t not in new else CHUNK)
            for t, (w, *_) in enumerate(self.rows)
        ]
        pieces = [(t, piece) for t, size, step in sizes for piece in _pieces(size, step)]
        # largest first: what is left for the end is small, and the cores finish together
        over_cores(write, sorted(pieces, key=lambda at: at[1].start - at[1].stop))
        self.patches.update((t, [piece for other, piece in found if other == t]) for t in new)
        for t in lerped:
            w, b, i, *_ = self.rows[t]
            for piece in self.patches[t]:
                _keep_equal_bits_(w[piece], b[piece], i[piece])


def _is_single_pass(row: Row, lam: float) -> bool:
    """Whether one torch operation writes the row, so that its pieces need no cache."""
    w, b, i, via, draw = row
    endpoint = lam in (0.0, 1.0) and via is None
    return _is_direct(*row) or (endpoint and (draw is None or (i if lam else b).dtype == w.dtype))


def _row_piece_(row: Row, piece: slice, lam: float) -> None:
    w, b, i, via, draw = row
    if draw is None:
        lerp_piece_(w[piece], b[piece], i[piece], lam, via)
    else:
        drawn_piece_(
            w[piece], b[piece], i[piece], lam, via, Draw(draw.key, draw.start + piece.start)
        )


def drawn_piece_(
    w: Tensor, b: Tensor, i: Tensor, lam: float, via: torch.dtype | None, draw: Draw
) -> None:
    """`reference.lerp` with noise, of flat CPU tensors into `w`, for a λ that is an fp32 number."""
    first = via or w.dtype
    source = i if lam else b
    if lam in (0.0, 1.0) and source.dtype == first:
        w.copy_(source)
        return
    x, wide_b, wide_i = noise.scratch(w.numel()).view(torch.float32)[:3]
    if lam in (0.0, 1.0):
        x.copy_(source)
    elif torch_lerp_is_exact(torch.float32):
        torch.lerp(wide_b.copy_(b), wide_i.copy_(i), lam, out=x)
        if _is_suspect(wide_b):
            _keep_equal_bits_(x, wide_b, wide_i)
    else:
        x.copy_(reference.lerp(b, i, lam, torch.float32))
    if first == w.dtype:
        noise.stochastic_(w, x, draw)
    else:
        narrow = torch.empty(w.numel(), dtype=first, device="cpu")
        noise.stochastic_(narrow, x, draw)
        w.copy_(narrow)
    if w.dtype == b.dtype == i.dtype and via is None and _is_suspect(b):
        _keep_equal_bits_(w, b, i)  # the payload of a NaN


def lerp_piece_(w: Tensor, b: Tensor, i: Tensor, lam: float, via: torch.dtype | None) -> None:
    """`reference.lerp` of flat CPU tensors into `w`, for a λ that is an fp32 number; scratch of
    their size."""
    if lam in (0.0, 1.0):
        source = i if lam else b
        w.copy_(source if via is None else source.to(via))
    elif _is_direct(w, b, i, via):
        torch.lerp(b, i, lam, out=w)
        if _is_suspect(b):
            _keep_equal_bits_(w, b, i)
    elif torch_lerp_is_exact(torch.float32):
        wide_b, wide_i = b.float(), i.float()
        merged = torch.lerp(wide_b, wide_i, lam)
        if _is_suspect(wide_b):
            _keep_equal_bits_(merged, wide_b, wide_i)
        w.copy_(merged if via is None else merged.to(via))
    else:
        w.copy_(reference.lerp(b, i, lam, w.dtype, via))


def _is_direct(
    w: Tensor, b: Tensor, i: Tensor, via: torch.dtype | None, draw: Draw | None = None
) -> bool:
    """Whether torch.lerp can write `w` by itself."""
    return (
        via is None
        and draw is None
        and w.dtype == b.dtype == i.dtype
        and torch_lerp_is_exact(w.dtype)
    )


def _is_suspect(b: Tensor) -> bool:
    """Whether `b` may hold a −0 or a non-finite value: two reductions, since sums carry NaN and
    infinity along."""
    if b.numel() == 0:
        return False
    integers = b.view(BITS[b.dtype])
    return int(integers.amin()) == torch.iinfo(integers.dtype).min or not math.isfinite(b.sum())


def _needs_patch(b: Tensor, i: Tensor) -> bool:
    return _is_suspect(b) and bool((reference.same_bits(b, i) & ((b == 0) | ~b.isfinite())).any())


def _keep_equal_bits_(w: Tensor, b: Tensor, i: Tensor) -> None:
    """Give `w` its sources' bits where they agree: torch.lerp makes +0 of two −0, and NaN of two
    infinities."""
    kind = BITS[w.dtype]
    with inference():
        torch.where(reference.same_bits(b, i), b.view(kind), w.view(kind), out=w.view(kind))


@functools.cache
def torch_lerp_is_exact(dtype: torch.dtype) -> bool:
    """Whether this build's CPU `torch.lerp` has the contract's bits, by a few hundred chosen
    values.

    Without fused multiply-add it has not: up to 40 % of fp32 results differ.
    """
    exponents = [2.0**k for k in range(-12, 12)]
    near = (1.0, 1.3612505, 1.0000001, -1.9999999, 0.33333334)
    chosen = [x * y for x in exponents for y in near] + [3e-41, -7e-42, 1e-38, 6e-8, 65504.0]
    b = torch.tensor(chosen, dtype=torch.float32, device="cpu").to(dtype)
    i = torch.cat([b[1:] * 1.0625, b[:1] - 0.1]).to(dtype)
    b, i = torch.cat([b, b, b * 1.01]), torch.cat([i, b.flip(0), b * 1.02])
    for lam in (0.0055872, 0.05, 1 / 3, 0.49999997, 0.5, 0.6, 0.999, -0.2, 1.5, 3.7):
        # whole vectors of every width, then what is left over
        for length in (b.numel(), 71, 33, 15, 7, 1):
            expected = reference.lerp(b[:length], i[:length], lam)
            with inference():
                found = torch.lerp(b[:length], i[:length], reference.fp32(lam))
            # zeros of equal sources and what is not finite are patched wherever torch.lerp is used
            if not bool(
                (
                    reference.same_bits(found, expected) | (expected == 0) | ~b[:length].isfinite()
                ).all()
            ):
                return False
    return True


def _pieces(size: int, step: int = CHUNK) -> Iterator[slice]:
    return (slice(start, min(start + step, size)) for start in range(0, size, step))


def _triton_groups(rows: Sequence[Row], entries: Sequence[int]) -> list[Group]:
    if not entries:
        return []
    from pa_kernels import drawn_triton, lerp_triton

    kinds: dict[tuple[object, ...], list[int]] = {}
    for t in entries:
        w, b, i, via, draw = rows[t]
        kinds.setdefault((w.device, w.dtype, b.dtype, i.dtype, via, draw is None), []).append(t)
    groups: list[Group] = []
    for members in kinds.values():
        out, base, inst, vias, draws = zip(*(rows[t] for t in members))
        if draws[0] is None:
            groups.append(lerp_triton.Group(members, out, base, inst, vias[0]))
        else:
            groups.append(drawn_triton.Group(members, out, base, inst, vias[0], draws))
    return groups


def _checked(
    out: Sequence[Tensor],
    base: Sequence[Tensor],
    inst: Sequence[Tensor],
    via: Sequence[torch.dtype | None] | None,
    draws: Sequence[Draw | None] | None,
) -> list[Row]:
    vias = [None] * len(out) if via is None else list(via)
    draws = [None] * len(out) if draws is None else list(draws)
    if not len(out) == len(base) == len(inst) == len(vias) == len(draws):
        raise ValueError(
            f"{len(out)} live tensors, {len(base)} base, {len(inst)} instruct, {len(vias)} via,"
            f" {len(draws)} draws: expected as many of each"
        )
    rows: list[Row] = []
    for t, (w, b, i, rounding, draw) in enumerate(zip(out, base, inst, vias, draws)):
        for side, tensor in (("live", w), ("base", b), ("instruct", i)):
            if not isinstance(tensor, Tensor) or tensor.dtype not in LIVE_DTYPES:
                found = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
                raise TypeError(
                    f"entry {t}: {side} is {found}, expected a tensor of bfloat16, float16 or"
                    " float32"
                )
            if not tensor.is_contiguous():
                raise ValueError(
                    f"entry {t}: {side} has strides {tensor.stride()} for shape"
                    f" {tuple(tensor.shape)}, expected contiguous"
                )
            if tensor.shape != w.shape:
                raise ValueError(
                    f"entry {t}: {side} has shape {tuple(tensor.shape)}, the live tensor"
                    f" {tuple(w.shape)}"
                )
            if tensor.device != w.device and not (w.device.type == "cuda" and tensor.is_pinned()):
                raise ValueError(
                    f"entry {t}: {side} is on {tensor.device}, the live tensor on {w.device}"
                )
        if w.device.type not in ("cpu", "cuda"):
            raise ValueError(f"entry {t}: on {w.device}, expected cpu or cuda")
        if rounding is not None and rounding not in LIVE_DTYPES:
            raise TypeError(
                f"entry {t}: via is {rounding}, expected bfloat16, float16, float32 or None"
            )
        # rounding to fp32, or twice to the same dtype, changes nothing
        rounding = None if rounding in (torch.float32, w.dtype) else rounding
        draw = None if (rounding or w.dtype) == torch.float32 else draw
        rows.append((w.detach().view(-1), b.detach().view(-1), i.detach().view(-1), rounding, draw))
    return rows
