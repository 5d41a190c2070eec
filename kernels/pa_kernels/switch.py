"""The skeleton of every op: live tensors are checked, grouped by what one launch can rewrite
together, and rewritten for any λ by a table per group."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from pa_kernels import reference, tiles
from pa_kernels.cores import inference, settle
from pa_kernels.reference import LIVE_DTYPES, Draw
from pa_kernels.tiles import OPTIONS, Launch, is_on_cpu


@dataclass(frozen=True)
class SwitchRow:
    """One entry of a switch, checked.

    Attributes:
        operands: the live tensor, then its sources, in the order in which a kernel takes them;
            detached.
        intermediate_dtype: what a result is rounded to before the live dtype, where that matters.
        draw: the noise of the first rounding, where that is stochastic.
    """

    operands: tuple[Tensor, ...]
    intermediate_dtype: torch.dtype | None = None
    draw: Draw | None = None

    @property
    def out(self) -> Tensor:
        return self.operands[0]

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        return tuple(tensor.dtype for tensor in self.operands)

    @property
    def kind(self) -> Hashable:
        """Return what the rows of one launch on a GPU have in common."""
        return self.out.device, self.dtypes, self.intermediate_dtype, self.draw is None


@dataclass(frozen=True)
class Written:
    """What the last switch wrote to a live tensor, summed while it was in registers or in cache.

    Attributes:
        checksum: of every byte of the tensor, as `checksum` gives it if memory holds them.
        products: ⟨W − B, D − B⟩ and ‖D − B‖², of fp32 products; None if they are not known.
    """

    checksum: int
    products: tuple[float, float] | None = None


R = TypeVar("R", bound=SwitchRow)


class SwitchGroup(Generic[R]):
    """Rows that are rewritten together. Writing `lams` and calling `launch_` is all that a switch
    does.

    Attributes:
        entries: places of the rows in the caller's lists.
        lams: fp32 [T] on the rows' device; what the next launch reads, a replayed CUDA graph
            included.
    """

    def __init__(self, entries: Sequence[int], rows: Sequence[R]):
        self.entries, self.rows = tuple(entries), tuple(rows)
        self.device = rows[0].out.device
        self.lams = torch.zeros(len(rows), dtype=torch.float32, device=self.device)

    def launch_(self) -> None:
        """Rewrite the live tensors for the λ in `lams`."""
        raise NotImplementedError


class TritonGroup(SwitchGroup[R]):
    """Rows of one kind on one device, as one launch of a kernel whose arguments are words, sizes
    and pointers of `tiles`, then `tables`, then `constants`."""

    kernel: Any
    launch: Launch
    constants: Mapping[str, Any]

    def cut(self, sizes: Sequence[int], block: int, allowed: Sequence[bool] | None = None) -> None:
        """Cut rows of these sizes into tiles; see `tiles.build`."""
        operands = list(zip(*(row.operands for row in self.rows)))
        self.tiles = tiles.build(operands, sizes, block, allowed)

    @property
    def tables(self) -> tuple[Tensor | None, ...]:
        """Tables of which the kernel reads a number for each tensor, after the pointers."""
        return (self.lams,)

    def launch_(self) -> None:
        self.launch.start(
            self.kernel,
            self.tiles.count,
            self.device,
            self.tiles.words,
            self.tiles.sizes,
            *self.tiles.pointers,
            *self.tables,
            **self.constants,
            **OPTIONS,
        )


G = TypeVar("G", bound=SwitchGroup[Any])


class Switch(Generic[G]):
    """T live tensors, prepared once so that each λ costs one pass and nothing else.

    Attributes:
        count: T.
        groups: between them every entry once: one for all CPU tensors, and one for each kind of row
            on a GPU.
    """

    def __init__(self, rows: Sequence[SwitchRow]):
        self.count = len(rows)
        members: dict[Hashable, list[int]] = {}
        for t, row in enumerate(rows):
            members.setdefault("cpu" if is_on_cpu(row.out) else row.kind, []).append(t)
        self.groups: tuple[G, ...] = tuple(
            self._group(kind == "cpu")(entries, [rows[t] for t in entries])
            for kind, entries in members.items()
        )

    def _group(self, on_cpu: bool) -> type[G]:
        """The op's group of CPU tensors, or the one that launches kernels: Triton is imported where
        that is asked for, and nowhere else."""
        raise NotImplementedError

    def run_(self, lam: float | Sequence[float]) -> None:
        """Rewrite every live tensor for λ, one for all or one for each.

        Raises:
            ValueError: a λ is not finite in fp32, or there are not as many as tensors.
        """
        lams = one_for_each(lam, self.count)
        settle()  # a helper that an interrupt has left at work reads the tables
        with inference():
            for group in self.groups:
                if isinstance(lam, Sequence):
                    group.lams.copy_(by_entry(group, lams), non_blocking=True)
                else:
                    group.lams.fill_(lams[0])
        self.launch_()

    def launch_(self) -> None:
        """Rewrite every live tensor for the λ that the groups' tables hold; on a GPU without
        touching the host."""
        for group in self.groups:
            group.launch_()


def by_entry(group: SwitchGroup[Any], values: Sequence[float]) -> Tensor:
    """fp32 [T] of the group's entries, from the values of all entries. For a GPU in pinned memory,
    whose copies do not wait for the device; torch reuses it once they are done."""
    own = [values[t] for t in group.entries]
    pinned = group.device.type == "cuda"
    return torch.tensor(own, dtype=torch.float32, device="cpu", pin_memory=pinned)


def one_for_each(lam: float | Sequence[float], count: int) -> list[float]:
    """λ of each tensor, rounded to fp32, −0 made 0; at least one, so that a bad λ is refused where
    there are no tensors."""
    if isinstance(lam, Sequence):
        if len(lam) != count:
            raise ValueError(f"{len(lam)} λ for {count} tensors: expected one, or one for each")
        return [reference.fp32(x) + 0.0 for x in lam]
    return [reference.fp32(lam) + 0.0] * max(count, 1)


def refuse_flushed_denormals() -> None:
    if float(torch.full((), 1e-39, dtype=torch.float32, device="cpu") * 0.5) == 0.0:
        raise RuntimeError(
            "denormal numbers are flushed to zero in this process: call"
            " torch.set_flush_denormal(False) to merge exactly"
        )


def columns(lists: Mapping[str, Sequence[Any] | None]) -> list[tuple[Any, ...]]:
    """One tuple for each entry, of lists of one length; None stands for a list of None.

    Raises:
        ValueError: their lengths differ, with what each is a list of.
    """
    count = len(next(iter(lists.values())) or ())
    filled = [[None] * count if x is None else x for x in lists.values()]
    if any(len(x) != count for x in filled):
        counted = ", ".join(f"{len(x)} {name}" for name, x in zip(lists, filled))
        raise ValueError(f"{counted}: expected as many of each")
    return list(zip(*filled))


def check_tensor(
    t: int, side: str, tensor: Any, dtypes: Sequence[torch.dtype] = LIVE_DTYPES
) -> None:
    """Raise unless `tensor`, the `side` of entry t, is a contiguous tensor of one of `dtypes`."""
    if not isinstance(tensor, Tensor) or tensor.dtype not in dtypes:
        got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"entry {t}: {side} is {got}, expected a tensor of {listed(dtypes)}")
    if not tensor.is_contiguous():
        raise ValueError(
            f"entry {t}: {side} has strides {tensor.stride()} for shape {tuple(tensor.shape)},"
            " expected contiguous"
        )


def check_place(t: int, side: str, tensor: Tensor, live: Tensor, *, may_be_pinned: bool) -> None:
    """Raise unless `tensor`, the `side` of entry t, is where the live tensor is, on a CPU or a GPU,
    or for a GPU in pinned host memory where that is allowed."""
    device = live.device
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"entry {t}: on {device}, expected cpu or cuda")
    if tensor.device != device and not (
        may_be_pinned and device.type == "cuda" and tensor.is_pinned()
    ):
        raise ValueError(f"entry {t}: {side} is on {tensor.device}, the live tensor on {device}")


def checked_intermediate(t: int, dtype: torch.dtype | None, live: Tensor) -> torch.dtype | None:
    """The intermediate dtype of entry t, or None where rounding to it first changes nothing."""
    if dtype is not None and dtype not in LIVE_DTYPES:
        raise TypeError(
            f"entry {t}: intermediate_dtype is {dtype}, expected {listed(LIVE_DTYPES)} or None"
        )
    return reference.needed_intermediate(dtype, live.dtype)


def listed(dtypes: Sequence[torch.dtype]) -> str:
    """Names of dtypes as in prose: `bfloat16, float16 or float32`."""
    *first, last = (str(dtype).removeprefix("torch.") for dtype in dtypes)
    return f"{', '.join(first)} or {last}" if first else last
