"""Everything that needs a GPU, correctness first: `make gpu`. Refuses to print a speed when a test fails.

Without a GPU the same tests run under Triton's interpreter, and it says so.

Times, per GPU, the dense switch of a model's shapes (P1, P2) for every launch candidate, beside two ceilings measured in the
same run: a device copy, and the better of torch.add and our own kernel over flat buffers. Rows go to bench/results/.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import itertools
import os
import pathlib
import re
import statistics
import subprocess
import sys
from collections.abc import Callable

import torch

ROOT = pathlib.Path(__file__).parents[1]
ROUNDS = 9
LAYER = [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336), (4096,), (4096,)]
OUTSIDE = [(128256, 4096), (128256, 4096), (4096,)]
LAYERS = 32
"""Llama-3.1-8B's shapes: 8.03 G weights."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=None, help="layers of an 8B model to time; as many as fit, by default")
    parser.add_argument("--only-time", action="store_true", help="skip the tests; the bits of what is timed are still checked")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        passed = tests_pass(interpreted=True)
        print("No CUDA device: kernel bodies ran under Triton's interpreter on the CPU. Nothing ran on a GPU, nothing was timed.")
        return 0 if passed else 1
    if not options.only_time and not tests_pass():
        print("a kernel test failed: no speed is printed", file=sys.stderr)
        return 1
    for what, timed in (("lerp", lambda: time_switches(options.layers)), ("packed", time_packed)):
        rows = timed()
        torch.cuda.empty_cache()
        if rows is None:
            return 1
        path = save(what, rows)
        print(f"\n{path.relative_to(ROOT)}: {len(rows)} rows")
    return 0


def tests_pass(interpreted: bool = False) -> bool:
    """Run what is marked `gpu` or `triton`; nothing passed is not a pass."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "tests", "-m", "gpu or triton", "-rs"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"} if interpreted else None,
        stdout=subprocess.PIPE,
        text=True,
    )
    print(done.stdout)
    passed = re.search(r"(\d+) passed", done.stdout)
    return done.returncode == 0 and passed is not None


def time_switches(layers: int | None) -> list[dict[str, object]] | None:
    """Rows of every contender; None if a switch had wrong bits."""
    from pa_kernels import Lerp, lerp_triton, reference

    per_layer = sum(torch.Size(shape).numel() for shape in LAYER)
    fixed = sum(torch.Size(shape).numel() for shape in OUTSIDE)
    room = int(torch.cuda.mem_get_info()[0] * 0.9) // 6 - fixed
    layers = min(LAYERS, room // per_layer) if layers is None else layers
    if layers < 1:
        print("not enough free device memory for one layer of an 8B model", file=sys.stderr)
        return None
    sizes = [torch.Size(shape).numel() for shape in [*LAYER * layers, *OUTSIDE]]
    count = sum(sizes)
    b = torch.empty(count, dtype=torch.bfloat16, device="cuda").normal_(0, 0.02)
    i = torch.empty(count, dtype=torch.bfloat16, device="cuda").normal_(0, 0.02)
    w = torch.empty(count, dtype=torch.bfloat16, device="cuda")
    out, base, inst = (list(x.split(sizes)) for x in (w, b, i))

    contenders: dict[str, tuple[int, Callable[[], object]]] = {
        "device copy": (4, lambda: w.copy_(b)),
        "flat add, 2 reads 1 write": (6, lambda: torch.add(b, i, out=w)),
        "torch.lerp(out=) per tensor": (6, lambda: [torch.lerp(x, y, 0.3, out=z) for x, y, z in zip(base, inst, out)]),
        "copy_(torch.lerp()) per tensor": (6, lambda: [z.copy_(torch.lerp(x, y, 0.3)) for x, y, z in zip(base, inst, out)]),
        "copy_ + _foreach_lerp_": (6, lambda: (torch._foreach_copy_(out, base), torch._foreach_lerp_(out, inst, 0.3))),
    }
    sample = slice(count - 1_000_000, count)
    expected = reference.lerp(b[sample].cpu(), i[sample].cpu(), 0.3)
    flat = Lerp([w], [b], [i])
    flat.run_(0.3)
    for launch in lerp_triton.CANDIDATES:
        group = lerp_triton.Group(range(len(out)), out, base, inst, None, launch)
        group.lams.fill_(0.3)
        w.fill_(9)
        group.launch_()
        if not torch.equal(w[sample].cpu().view(torch.int16), expected.view(torch.int16)):
            print(f"wrong bits from {launch}: no speed is printed", file=sys.stderr)
            return None
        contenders[f"ours {launch.block}/{launch.threads}"] = (6, group.launch_)
    contenders["ours, one flat tensor"] = (6, flat.launch_)
    lerp = Lerp(out, base, inst)
    contenders["ours as shipped"] = (6, lerp.launch_)
    contenders["ours as shipped, again"] = (6, lerp.launch_)
    lerp.run_(0.3)

    medians = timed(contenders)
    speed = {name: contenders[name][0] * count / medians[name] for name in contenders}
    # the best 2-read-1-write stream over flat buffers that is known here: torch's add, or our kernel on one tensor
    copy, stream = speed["device copy"], max(speed["flat add, 2 reads 1 write"], speed["ours, one flat tensor"])
    print(
        f"{torch.cuda.get_device_name()}: {count / 1e9:.2f} G bf16 weights in {len(sizes)} tensors, median of {ROUNDS}, in turn"
    )
    for name in contenders:
        shares = f"{speed[name] / copy:6.1%} of copy {speed[name] / stream:6.1%} of stream"
        times = medians[name] / medians["ours as shipped"]
        print(f"{name:32} {medians[name] * 1000:9.3f} ms {speed[name] / 1e9:8.1f} GB/s {shares} {times:5.2f}× ours")
    return [
        {
            "what": name,
            "weights": count,
            "tensors": len(sizes),
            "bytes": contenders[name][0] * count,
            "ms": round(medians[name] * 1000, 4),
            "gbps": round(speed[name] / 1e9, 1),
            "of_copy": round(speed[name] / copy, 4),
            "of_stream": round(speed[name] / stream, 4),
        }
        for name in contenders
    ]


def time_packed(weights: int = 1 << 31) -> list[dict[str, object]] | None:
    """Rows of packed switches, of pairs with three sizes of delta (P3, P4); None if a switch had wrong bits."""
    room = int(torch.cuda.mem_get_info()[0] * 0.8) // 16
    sizes = [min(weights, room) // 32 // 32768 * 32768] * 32
    rows = []
    for relative in (0.017, 0.044, 0.23):
        found = time_packed_pair(relative, sizes, pinned=relative == 0.017)
        if found is None:
            return None
        rows += found
    return rows


def time_packed_pair(relative: float, sizes: list[int], pinned: bool) -> list[dict[str, object]] | None:
    """Packed switches of one pair with every launch, beside dense ones of its weights, on the device and from host memory."""
    from pa_kernels import Lerp, Packed, PackedTensor, packed_triton, reference

    b = torch.empty(sum(sizes), dtype=torch.bfloat16, device="cuda").normal_(0, 0.02)
    steps = (torch.empty(size, device="cuda").normal_(0, 0.02 * relative) for size in sizes)
    i = torch.cat([(part.float() + step).bfloat16() for part, step in zip(b.split(sizes), steps)])
    w = b.clone()
    out, base, inst = (list(x.split(sizes)) for x in (w, b, i))
    entries = [entry for x, y in zip(base, inst) if (entry := PackedTensor.encode(x, y)) is not None]
    assert len(entries) == len(sizes), "exceptions outnumber a tensor"
    held = sum(entry.nbytes for entry in entries)
    lerp = Lerp(out, base, inst)
    lerp.run_(0.3)
    contenders: dict[str, tuple[int, Callable[[], object]]] = {
        "device copy": (2 * w.nbytes, lambda: w.copy_(b)),
        "dense": (3 * w.nbytes, lerp.launch_),
        "dense, again": (3 * w.nbytes, lerp.launch_),
    }
    expected = reference.lerp(b[: 1 << 20].cpu(), i[: 1 << 20].cpu(), 0.3)
    for launch in packed_triton.CANDIDATES:
        packed = Packed(out, entries)
        for group in packed.groups:
            assert isinstance(group, packed_triton.Group)
            group.relaunch(launch)
        w.copy_(b)
        packed.holds(0.0)
        for lam in (0.7, 0.3):
            packed.run_(lam)
        if packed.wrong() or not torch.equal(w[: 1 << 20].cpu().view(torch.int16), expected.view(torch.int16)):
            print(f"wrong bits from packed {launch}: no speed is printed", file=sys.stderr)
            return None
        # what others write between its rounds changes its sums, not its time
        contenders[f"packed {entries[0].width}-bit {launch.threads}"] = (2 * w.nbytes + held, packed.launch_)
    if pinned:
        part = slice(0, min(1 << 28, w.numel()))
        there = [side[part].cpu().pin_memory() for side in (b, i)]
        host = Lerp([w[part]], [there[0]], [there[1]])
        contenders["pinned copy to the device"] = (there[0].nbytes, lambda: w[part].copy_(there[0], non_blocking=True))
        contenders["dense from pinned host memory"] = (2 * there[0].nbytes, host.launch_)
    medians = timed(contenders)
    rows: list[dict[str, object]] = []
    for name, (moved, _) in contenders.items():
        speed, share = moved / medians[name] / 1e9, medians[name] / medians["dense"]
        print(f"{relative:6g} {name:32} {medians[name] * 1000:9.3f} ms {speed:8.1f} GB/s {share:5.2f} × dense")
        row = {
            "what": name,
            "relative_delta": relative,
            "weights": sum(sizes),
            "bytes": moved,
            "ms": round(medians[name] * 1000, 4),
        }
        rows.append(
            {**row, "gbps": round(speed, 1), "of_dense": round(share, 4), "bytes_per_weight": round(2 + held / sum(sizes), 4)}
        )
    return rows


def timed(contenders: dict[str, tuple[int, Callable[[], object]]]) -> dict[str, float]:
    """Median seconds of each, in turn, after two rounds to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for round_, (name, (_, run)) in itertools.product(range(ROUNDS + 2), contenders.items()):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        if round_ >= 2:
            seconds[name].append(start.elapsed_time(end) / 1000)
    return {name: statistics.median(values) for name, values in seconds.items()}


def save(what: str, rows: list[dict[str, object]]) -> pathlib.Path:
    """Write the rows with machine and versions to a dated file."""
    import triton

    now = datetime.datetime.now(datetime.timezone.utc)
    said = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    driver = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True)
    machine = {
        "date": now.date().isoformat(),
        "gpu": torch.cuda.get_device_name(),
        "driver": driver.stdout.splitlines()[0] if driver.stdout else "",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": said,
    }
    path = ROOT / "bench" / "results" / f"{what}-{now:%Y%m%d-%H%M%S}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*machine, *rows[0]])
        writer.writeheader()
        writer.writerows({**machine, **row} for row in rows)
    return path


if __name__ == "__main__":
    sys.exit(main())
