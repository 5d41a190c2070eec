"""Merges by a rule and with stochastic rounding: the bits, what the folder says of itself, and what
verify makes of it."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import pytest
import torch
from pa_kernels import reference
from pa_kernels.reference import Draw

import pa_fast.checkpoint.streaming as streaming
from pa_fast import LambdaRule
from pa_fast.checkpoint.merge import merge
from pa_fast.checkpoint.pair import PairOptions
from pa_fast.checkpoint.provenance import ChosenFrom, Provenance, SideRecord, model_card
from pa_fast.checkpoint.verify import verify
from pa_fast.errors import UsageError
from tests.checkpoint.pairs import load_folder, same_bits, write_checkpoint, write_pair

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
RULE = [{"group": "norms", "lambda": 1}, {"match": "a.*", "times": "1/3"}]
LAMS = {"model.norm.weight": 1.0, "a.odd": 0.2}


def test_a_rule_gives_each_tensor_its_lambda(tmp_path: Path) -> None:
    folders = write_pair(tmp_path, shards=(3, 2))
    report = merge(*folders, "0.6", tmp_path / "out", rule=RULE)
    b, i, w = (load_folder(folder) for folder in (*folders, tmp_path / "out"))
    for name in w:
        assert same_bits(w[name], reference.lerp(b[name], i[name], LAMS.get(name, 0.6))), name
    assert [note for note in report.notes if note.startswith("rule")] == [
        'rule (group: norms, lambda: "1"): `model.norm.weight`, λ = 1',
        'rule (match: "a.*", times: "1/3"): `a.odd`, λ = 0.2',
        "rule (no row): 3 tensors such as `model.embed_tokens.weight`, λ = 0.6",
    ]
    said = json.loads((tmp_path / "out" / "pa_fast.json").read_text())
    assert (
        said["rule"] == [{"group": "norms", "lambda": "1"}, {"match": "a.*", "times": "1/3"}]
        and said["seed"] is None
    )
    assert verify(tmp_path / "out", *folders).ok
    card = (tmp_path / "out" / "README.md").read_text()
    assert '- {"group": "norms", "lambda": "1"}' in card and "--rule rule.yaml" in card


@pytest.mark.parametrize(
    ("base", "instruct"), [(BF16, BF16), (FP32, BF16), (FP16, FP16), (FP32, FP32)], ids=str
)
def test_stochastic_rounding_is_the_reference(
    tmp_path: Path, base: torch.dtype, instruct: torch.dtype
) -> None:
    folders = write_pair(tmp_path, base, instruct, shards=(1, 2))
    for lam in ("0", "0.3", "1"):
        out = tmp_path / lam
        merge(*folders, lam, out, rounding="stochastic", seed=5)
        b, i, w = (load_folder(folder) for folder in (*folders, out))
        for name in w:
            noise = Draw(zlib.crc32(name.encode()) ^ 5)
            assert same_bits(w[name], reference.lerp(b[name], i[name], float(lam), draw=noise)), (
                name
            )
        said = json.loads((out / "pa_fast.json").read_text())
        assert (said["rounding"], said["seed"]) == ("stochastic", 5)
        assert "--rounding stochastic --seed 5" in (out / "README.md").read_text()
        assert verify(out, *folders).ok


def test_chunks_and_shards_change_no_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    b = {"w": torch.randn(300_000).bfloat16()}
    i = {"w": (b["w"].float() + 0.1).bfloat16()}
    folders = write_checkpoint(tmp_path / "base", b), write_checkpoint(tmp_path / "instruct", i)
    merge(*folders, 0.3, tmp_path / "whole", rounding="stochastic")
    monkeypatch.setattr(streaming, "CHUNK_ELEMENTS", 2**16)
    merge(*folders, 0.3, tmp_path / "cut", rounding="stochastic")
    assert same_bits(load_folder(tmp_path / "whole")["w"], load_folder(tmp_path / "cut")["w"])
    assert verify(tmp_path / "whole", *folders).ok


def test_verify_goes_by_the_folder_unless_told_otherwise(tmp_path: Path) -> None:
    b = {"norm.w": torch.randn(2000), "v": torch.randn(2000)}
    i = {name: value + 0.1 for name, value in b.items()}
    folders = write_checkpoint(tmp_path / "base", b), write_checkpoint(tmp_path / "instruct", i)
    out, rule = tmp_path / "out", [{"group": "norms", "lambda": 0.5}]
    merge(*folders, 0.3, out, dtype="bfloat16", rounding="stochastic", seed=1, rule=rule)
    assert verify(out, *folders).ok
    assert (
        verify(out, *folders, "0.3", rounding="stochastic", seed=1, rule=rule).notes
        == verify(out, *folders).notes
    )
    for other, noted in (
        ({"seed": 2}, "rounding stochastic, seed 1, compared with rounding stochastic, seed 2"),
        ({"rounding": "nearest"}, "rounding stochastic, seed 1, compared with rounding nearest"),
        (
            {"rule": [{"match": "v", "times": 0.5}]},
            'the rule group: norms, lambda: "0.5", compared with the rule match: "v"',
        ),
        ({"lam": 0.4}, "says λ = 0.3, compared with λ = 0.4"),
    ):
        report = verify(out, *folders, **other)  # type: ignore[arg-type]
        assert not report.ok and any(noted in note for note in report.notes), report.notes
    (out / "pa_fast.json").unlink()
    assert verify(out, *folders, 0.3, rounding="stochastic", seed=1, rule=rule).ok
    assert not verify(out, *folders, 0.3).ok


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounding": "up"}, "rounding `up` is not available"),
        ({"seed": 3}, "seed 3 with rounding `nearest`"),
        ({"rounding": "stochastic", "seed": 2**32}, "seed 4294967296"),
        ({"rule": [{"match": "absent", "lambda": 1}]}, "no tensor has a name like `absent`"),
        ({"rule": "absent.yaml"}, "absent.yaml: the rule cannot be read"),
    ],
)
def test_refused_before_anything_is_written(
    tmp_path: Path, options: dict[str, object], message: str
) -> None:
    folders = write_pair(tmp_path)
    with pytest.raises(UsageError, match=message):
        merge(*folders, 0.3, tmp_path / "out", **options)  # type: ignore[arg-type]
    assert {path.name for path in tmp_path.iterdir()} == {"base", "instruct"}


def test_a_rule_object_stands_for_its_rows(tmp_path: Path) -> None:
    folders = write_pair(tmp_path)
    merge(*folders, "0.6", tmp_path / "a", rule=RULE)
    merge(*folders, "0.6", tmp_path / "b", rule=LambdaRule(RULE).at(9))
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (
        tmp_path / "b" / "model.safetensors"
    ).read_bytes()


def test_the_page_on_formats_names_every_field() -> None:
    source = SideRecord("a", None, "0", "0")
    options = PairOptions.of("refuse", "keep", ["rope_theta"], "module.")
    spec = streaming.MergeSpec.of("0.5", "nearest", None, None)
    chosen = ChosenFrom("runs/x", "icl", {"ifeval": 0.98}, "λ = 0.5.")
    provenance = Provenance(
        source, source, spec, "auto", options, store="lowrank", chosen_from=chosen
    )
    said = json.loads(provenance.to_json())
    page = (Path(__file__).parents[2] / "docs" / "formats.md").read_text()
    (table,) = [part for part in page.split("\n\n") if part.startswith("| field | meaning")]
    named = {name for line in table.splitlines() for name in line.split("|")[1].split("`")[1::2]}
    assert named == set(said)


def test_a_card_shows_the_names_of_a_run_as_text() -> None:
    hostile = "x\n\n# [a](b)\x1b[0m"
    source, spec = (
        SideRecord("a", None, "0", "0"),
        streaming.MergeSpec.of("0.5", "nearest", None, None),
    )
    chosen = ChosenFrom(hostile, hostile, {hostile: 0.98}, hostile)
    card = model_card(Provenance(source, source, spec, "auto", chosen_from=chosen), "out")
    assert "\x1b" not in card and card.count("\n# ") == 1
    rows = [line for line in card.splitlines() if "[a](b)" in line]
    assert len(rows) == 4 and all(line.startswith("    ") for line in rows)
