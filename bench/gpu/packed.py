"""Packed switches, both checksums included, with codes of both widths and layouts, beside dense
ones of the same weights (P3)."""

from __future__ import annotations

from pa_kernels import Lerp, Packed, PackedTensor
from pa_kernels.packed import triton as packed_triton

from bench.gpu.run import GpuRun
from bench.pairs import FlatPair
from bench.run import Skip
from pa_fast.throughput.harness import Way, Work, format_large, require_bits

RELATIVES = (0.017, 0.044)
"""‖I − B‖ / ‖B‖ of the pairs."""

GOALS = {"size": (1.1, (3.2, 3.52)), "speed": (0.95, (3.3, 3.7))}
"""By layout, the time over dense's that a switch may take, and the bytes per weight in all, for
each of RELATIVES."""

KINDS = ((8, "size"), (16, "size"), (8, "speed"))
"""Width and layout of codes."""


def packed(run: GpuRun) -> None:
    for k, relative in run.some(list(enumerate(RELATIVES))):
        _of_pair(run, relative, {layout: (at, most[k]) for layout, (at, most) in GOALS.items()})


def _of_pair(run: GpuRun, relative: float, goals: dict[str, tuple[float, float]]) -> None:
    sizes = _fitting(run)
    if not sizes:
        raise Skip("not one tensor fits the device memory that is free")
    pair = FlatPair.random(run, sizes, relative)
    out, aside = pair.out, run.random(pair.count)
    first, second = run.scale.lams

    def there_and_back(switch: Lerp | Packed) -> Work:
        # ends where it began, so that all of them can take turns on the same live tensors
        return lambda: (switch.run_(second), switch.run_(first))

    dense = Way("dense", there_and_back(Lerp(out, pair.base, pair.inst)), 2, 3 * pair.nbytes, 6.0)
    ways: list[Way] = []
    switches: dict[str, Packed] = {}
    layouts: dict[str, list[str]] = {layout: [] for layout in goals}
    for width, layout in KINDS:
        entries = [
            PackedTensor.encode(b, i, width=width, layout=layout)
            for b, i in zip(pair.base, pair.inst)
        ]
        made = [entry for entry in entries if entry is not None]
        if len(made) < len(entries):
            run.note(f"codes of {width} bits left out: exceptions outnumber a tensor")
            continue
        held = sum(entry.nbytes for entry in made)
        for launch in run.some(packed_triton.CANDIDATES):
            name = f"packed {width}-bit {layout}, {launch.threads} threads"
            layouts[layout].append(name)
            switches[name] = switch = Packed(out, made)
            switch.groups = tuple(
                packed_triton.PackedTritonGroup(group.entries, group.rows, launch)
                for group in switch.groups
            )
            pair.w.copy_(pair.b)
            switch.holds(0.0)
            for lam in (second, first):
                switch.run_(lam)
                pair.check(name, lam)
            kept = 2 + held / pair.count
            ways.append(Way(name, there_and_back(switch), 2, 2 * pair.nbytes + held, kept))
    copy = Way("device copy", lambda: aside.copy_(pair.b), moved_bytes=2 * pair.nbytes)
    found = run.time(dense, *ways, copy, dense.repeated)
    for name, switch in switches.items():
        # its own sums, of every switch that was timed: nobody found what another had not left
        require_bits(not switch.wrong(), f"{name}: sums of the switch before")
    pair.check(f"packed {relative:g}", first)
    if not ways:
        return
    for layout, names in layouts.items():
        if not names:
            continue
        own = [way for way in ways if way.name in names]
        smallest = min(way.bytes_per_weight or 0 for way in own)
        best = min(
            (found[way.name] for way in own if way.bytes_per_weight == smallest),
            key=lambda way: way.median_s,
        )
        ratio, (at, most) = best.median_s / found[dense.name].median_s, goals[layout]
        run.record(
            "P3",
            f"packed {relative:g}, layout {layout}: {format_large(pair.count)} bf16 weights",
            [found[way.name] for way in (dense, *own, copy, dense.repeated)],
            dense.name,
            goal=f"checksums included: ≤ {at:g} × dense at ≤ {most:g} bytes per weight",
            headline=f"{best.name}: {ratio:.2f} × at {smallest:.3f}",
            met=ratio <= at and smallest <= most,
        )


def _fitting(run: GpuRun) -> list[int]:
    """As many of the tensors as fit: live, two sides and a spare, codes of both widths and layouts,
    and what encoding takes for a while."""
    room, sizes = run.room() // 18, []
    for size in run.scale.packed:
        if size <= room:
            sizes.append(size)
            room -= size
    return sizes
