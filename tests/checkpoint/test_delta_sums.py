"""Sums over the weights of a pair, against one weight at a time in plain Python."""

from __future__ import annotations

import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pa_kernels import reference

from pa_fast.checkpoint.measure import (
    BUCKETS,
    DeltaSums,
    StoreSize,
    delta_sums,
    fidelity,
    module_path,
    short_names,
    store_size,
)
from pa_fast.checkpoint.streaming import TensorMerge

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
LAYOUT = {BF16: (16, 7, 0xFF), FP16: (16, 10, 0x1F), FP32: (32, 23, 0xFF)}


def bits(value: float, dtype: torch.dtype) -> int:
    wide = struct.unpack("<I", struct.pack("<f", value))[0]
    return {
        BF16: wide >> 16,
        FP16: struct.unpack("<H", struct.pack("<e", value))[0] if abs(value) < 65520 else 0,
        FP32: wide,
    }[dtype]


def plain(base: list[float], instruct: list[float], dtype: torch.dtype) -> dict[str, object]:
    width, low, mask = LAYOUT[dtype]
    found = {
        "unchanged": 0,
        "sign_crossings": 0,
        "binade_crossings": 0,
        "no_small_code": 0,
        "no_large_code": 0,
    }
    histogram = [0] * BUCKETS
    for b, i in zip(base, instruct):
        x, y = bits(b, dtype), bits(i, dtype)
        same_sign, k = x >> (width - 1) == y >> (width - 1), abs(x - y)
        exponents = (x >> low) & mask, (y >> low) & mask
        codable = same_sign and (k == 0 or all(0 < e < mask for e in exponents))
        found["unchanged"] += x == y
        found["sign_crossings"] += not same_sign
        found["binade_crossings"] += exponents[0] != exponents[1]
        found["no_small_code"] += not (codable and k <= 63)
        found["no_large_code"] += not (codable and k < 8192)
        if same_sign:
            histogram[k.bit_length()] += 1
    return {**found, "histogram": tuple(histogram), "weights": len(base), "inexact": 0}


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@settings(max_examples=60)
@given(data=st.data())
def test_equal_to_one_weight_at_a_time(dtype: torch.dtype, data: st.DataObject) -> None:
    kind, span = (torch.int32, 2**31) if dtype == FP32 else (torch.int16, 2**15)
    _, low, mask = LAYOUT[dtype]
    finite = st.integers(-span, span - 1).filter(lambda x: (x >> low) & mask != mask)
    near = st.tuples(finite, st.integers(-130, 130) | st.integers(-span, span)).map(
        lambda p: (p[0], p[0] + p[1])
    )
    pairs = data.draw(
        st.lists(
            near.filter(lambda p: -span <= p[1] < span and (p[1] >> low) & mask != mask),
            max_size=12,
        )
    )
    base, instruct = (
        torch.tensor([p[side] for p in pairs], dtype=kind).view(dtype) for side in (0, 1)
    )
    found = delta_sums(base, instruct, dtype)
    assert {key: getattr(found, key) for key in plain([], [], dtype)} == plain(
        base.tolist(), instruct.tolist(), dtype
    )


def test_norms_and_sides_that_the_live_dtype_cannot_hold() -> None:
    base, instruct = torch.tensor([3.0, 1.0001, -2.0]), torch.tensor([3.0, 1.0, 2.0]).bfloat16()
    found = delta_sums(base, instruct, BF16)
    assert found.base_square == pytest.approx(
        14.0002, rel=1e-6
    ) and found.delta_square == pytest.approx(16.0, rel=1e-6)
    assert (found.inexact, found.unchanged, found.sign_crossings) == (1, 1, 1)


def test_sums_of_pieces_are_the_sums_of_the_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(999, generator=generator).bfloat16()
    instruct = (base.float() + 0.02 * torch.randn(999, generator=generator)).bfloat16()
    whole = delta_sums(base, instruct, BF16, [TensorMerge(0.1, None), TensorMerge(0.5, None)])
    parts = DeltaSums()
    for start, stop in ((0, 400), (400, 400), (400, 999)):
        parts += delta_sums(
            base[start:stop],
            instruct[start:stop],
            BF16,
            [TensorMerge(0.1, None), TensorMerge(0.5, None)],
        )
    assert (parts.histogram, parts.unchanged, parts.no_small_code) == (
        whole.histogram,
        whole.unchanged,
        whole.no_small_code,
    )
    assert (
        parts.delta_square == pytest.approx(whole.delta_square)
        and parts.moved[1].weights == whole.moved[1].weights
    )
    assert whole.scaled(999) is whole
    twice = whole.scaled(1998)
    assert (twice.weights, twice.unchanged, twice.histogram[0]) == (
        1998,
        2 * whole.unchanged,
        2 * whole.histogram[0],
    )
    assert twice.moved[0].along == pytest.approx(2 * whole.moved[0].along)


def test_fidelity_is_its_definition() -> None:
    generator = torch.Generator().manual_seed(1)
    base = (0.02 * torch.randn(50_000, generator=generator)).bfloat16()
    instruct = (base.float() + 0.0004 * torch.randn(50_000, generator=generator)).bfloat16()
    lams = (0.0, 0.05, 0.5, 1.0)
    found = fidelity(base, instruct, [TensorMerge(lam, None) for lam in lams], BF16)
    delta = instruct.double() - base.double()
    for lam, moved in zip(lams, found):
        merged = reference.lerp(base, instruct, lam)
        assert moved.along == pytest.approx(
            float((merged.double() - base.double()) @ delta), rel=1e-4, abs=1e-9
        )
        assert moved.weights == int((merged != base).sum())
    effective = found[1].along / float(delta @ delta)
    assert 0.02 < effective < 0.035, "a delta of 2 % at λ = 0.05 acts like about 0.026"


def test_another_rounding_can_be_given() -> None:
    base, instruct = torch.zeros(4), torch.ones(4)
    (moved,) = fidelity(
        base, instruct, [TensorMerge(0.5, None)], FP32, lambda out, b, i, blend: out.copy_(i)
    )
    assert (moved.along, moved.weights) == (4.0, 4)


def test_store_sizes() -> None:
    sums = DeltaSums(weights=1_000_000, unchanged=990_000, no_small_code=1000, no_large_code=10)
    packed = 2 * 2048 * 245 + 6 * 1000 + 4 * 32 + 8
    assert store_size(sums, (2, 2), "BF16") == StoreSize(
        4_000_000, 20_000 + 8 * 17 + 40_000, packed
    )
    assert store_size(sums, (2, 2), "F16").packed == packed
    many = DeltaSums(weights=1_000_000, no_small_code=200_000, no_large_code=10)
    assert store_size(many, (2, 2), "BF16").packed == 2_000_060 + 4 * 32 + 8, (
        "16-bit codes, where 8 bits leave too many out"
    )
    assert (
        store_size(sums, (4, 4), "F32").packed == store_size(sums, (4, 4), "F32").dense == 8_000_000
    )
    inexact = DeltaSums(weights=1000, inexact=1)
    assert store_size(inexact, (4, 2), "BF16").packed == 6000, (
        "a side that the live dtype cannot hold is held dense"
    )
    assert (
        store_size(
            DeltaSums(weights=100, no_small_code=100, no_large_code=90), (2, 2), "BF16"
        ).packed
        == 400
    )
    assert store_size(sums, (2, 2), "BF16") + StoreSize(1, 2, 3) == StoreSize(
        4_000_001, 60_138, packed + 3
    )


@pytest.mark.parametrize(
    ("name", "layer", "module"),
    [
        ("model.layers.12.self_attn.q_proj.weight", 12, "model.layers.self_attn.q_proj"),
        ("model.layers.3.mlp.experts.17.w1.weight", 3, "model.layers.mlp.experts.*.w1"),
        ("transformer.h.0.attn.c_attn.bias", 0, "transformer.h.attn.c_attn.bias"),
        ("lm_head.weight", None, "lm_head"),
        ("model.vision_tower.blocks.٣.weight", None, "model.vision_tower.blocks.٣"),
        ("7", 7, ""),
    ],
)
def test_places(name: str, layer: int | None, module: str) -> None:
    assert (module_path(name).layer, module_path(name).module) == (layer, module)


def test_short_names_drop_what_all_layers_share() -> None:
    inside = ["model.layers.self_attn.q_proj", "model.layers.norm"]
    assert short_names([*inside, "lm_head"], inside) == {
        inside[0]: "self_attn.q_proj",
        inside[1]: "norm",
        "lm_head": "lm_head",
    }
    two = ["vision.blocks.norm", "text.layers.norm"]
    assert list(short_names(two, two).values()) == two, (
        "two stacks of layers keep their names apart"
    )
    assert short_names([], []) == {}
