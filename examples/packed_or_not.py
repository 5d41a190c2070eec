"""Why deltas are packed as they are: bytes of the alternatives on Gaussian pairs, and what naive
steps in bf16 do.

python -m examples.packed_or_not
"""

from __future__ import annotations

import torch
from pa_kernels import Packed, PackedTensor, reference

COUNT = 1 << 22
RELATIVE = (0.0018, 0.017, 0.044, 0.14, 0.23)


def pair(relative: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Base and instruct weights whose difference has that relative size."""
    generator = torch.Generator().manual_seed(0)
    base = 0.02 * torch.randn(COUNT, generator=generator)
    return (
        base.bfloat16(),
        (base + 0.02 * relative * torch.randn(COUNT, generator=generator)).bfloat16(),
    )


def in_one_binade(base: torch.Tensor, instruct: torch.Tensor) -> float:
    """Bytes per weight beside the live copy if only pairs within one power of two had 8-bit
    codes."""
    b, i = (side.view(torch.int16).int() for side in (base, instruct))
    coded = (b >> 7 == i >> 7) & ((i - b).abs() <= 63)
    return 1 + 6 * float((~coded).double().mean())


def exponent_planes(side: torch.Tensor) -> float:
    """Bytes per weight of one side as a byte of sign and mantissa and 4 bits of exponent, 15 of
    them in use; escapes take 6."""
    exponent = (side.view(torch.int16).int() >> 7) & 0xFF
    largest = int(exponent.max())
    return 1.5 + 6 * float((exponent <= largest - 15).double().mean())


def drift(
    base: torch.Tensor, instruct: torch.Tensor, steps: int = 100
) -> tuple[float, float, float]:
    """Share of wrong weights and relative error after so many steps W += (I − B)/steps in bf16, and
    that share by switches."""
    naive, live = base.clone(), base.clone()
    entry = PackedTensor.encode(base, instruct)
    assert entry is not None
    packed = Packed([live], [entry])
    packed.holds(0.0)
    step = ((instruct.float() - base.float()) / steps).bfloat16()
    for k in range(1, steps + 1):
        naive += step
        packed.run_(k / steps)
    error = (naive.float() - instruct.float()).norm() / (instruct.float() - base.float()).norm()
    wrong = float((~reference.same_bits(live, instruct)).double().mean())
    return float((naive != instruct).double().mean()), float(error), wrong


def main() -> None:
    print("bytes per weight beside the live copy")
    heads = (
        "‖I − B‖/‖B‖",
        "packed",
        "in one binade",
        "planes of B and 8-bit k",
        "planes of both",
        "dense",
    )
    print(
        f"{heads[0]:>12} {heads[1]:>7} {heads[2]:>14} {heads[3]:>24} {heads[4]:>15} {heads[5]:>6}"
    )
    for relative in RELATIVE:
        base, instruct = pair(relative)
        entry = PackedTensor.encode(base, instruct)
        assert entry is not None
        codes = reference.packed_codes(base, instruct, 8)[1].double().mean()
        planes = exponent_planes(base)
        print(
            f"{relative:12g} {entry.nbytes / COUNT:7.3f} {in_one_binade(base, instruct):14.3f}"
            f" {planes + 1 + 4 * float(codes):24.3f} {planes + exponent_planes(instruct):15.3f}"
            f" {4:6d}"
        )
    wrong, error, switched = drift(*pair(0.017))
    print(
        f"\n100 steps W += (I − B)/100 in bf16, delta 1.7 %: {wrong:.1%} of the weights wrong,"
        f" error {error:.2f} of ‖I − B‖"
    )
    print(f"100 packed switches to the same place: {switched:.1%} wrong")


if __name__ == "__main__":
    main()
