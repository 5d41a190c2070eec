"""From two folders to a delta file, to a sweep that says what it lost, to the points that an exact
store confirms."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import pa_fast
from pa_fast.errors import DataError, EvaluatorError, OutputError, PairError, UsageError
from pa_fast.run import SweepSpec, check_beside_delta, check_confirm, confirm, run
from pa_fast.stores.file import DeltaFile
from pa_fast.stores.registry import STORES

DEMO = Path(__file__).parents[1] / "examples" / "demo"
BASE, INSTRUCT = DEMO / "pair" / "base", DEMO / "pair" / "instruct"
EVALS = (f"icl:{DEMO / 'fewshot.jsonl'},shots=1,sep=\\n,name=icl",)


def spec(out: Path, **changes: Any) -> SweepSpec:
    given = {
        "base": str(BASE),
        "instruct": str(INSTRUCT),
        "lambdas": "0:1:0.5",
        "evals": EVALS,
        "out": str(out),
        "limit": 8,
    }
    return SweepSpec(**{**given, **changes})


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """(format, rank) → the pair's delta file, encoded once; only read."""
    folder = tmp_path_factory.mktemp("deltas")

    def delta(format: str, rank: int | None = None) -> Path:
        out = folder / f"{format}-{rank}"
        if not out.exists():
            pa_fast.encode(BASE, INSTRUCT, out, format, rank=rank)
        return out

    return delta


def test_a_lossless_delta_gives_the_sweep_of_the_pair(tmp_path: Path) -> None:
    report = pa_fast.encode(BASE, INSTRUCT, tmp_path / "delta")
    assert report.lossless and report.relative_error == 0
    whole = run(spec(tmp_path / "whole"))
    alone = run(
        spec(
            tmp_path / "alone",
            instruct=None,
            delta=str(tmp_path / "delta"),
            tokenizer=str(INSTRUCT),
        )
    )
    assert alone.rows == whole.rows and alone.approximation is None
    recorded = [
        json.loads((tmp_path / name / "run.json").read_text())["engine"]
        for name in ("whole", "alone")
    ]
    assert (
        recorded[1]["instruct"].startswith("delta ")
        and recorded[0]["instruct"] != recorded[1]["instruct"]
    )


@pytest.mark.draws
def test_a_lossy_sweep_says_so_and_its_best_points_are_confirmed(tmp_path: Path) -> None:
    job = spec(tmp_path / "run", store="lowrank")
    result = run(job)
    assert result.approximation == "lowrank, rank 64, seed 0"
    assert (
        json.loads((tmp_path / "run" / "results.json").read_text())["approximation"]
        == result.approximation
    )
    assert "approximate delta" in str(result.table().caption)
    assert "approximate delta: lowrank" in (tmp_path / "run" / "trajectory.svg").read_text()
    best = [row.lam.key for row in result.ranked("icl")[:2]]
    confirmed = confirm(job, result, 2)
    assert confirmed.approximation is None and confirmed.out == tmp_path / "run" / "confirmed"
    assert {row.lam.key for row in confirmed.rows} == set(best)
    exact = run(spec(tmp_path / "exact"))
    assert {row.lam.key: row.score for row in confirmed.rows}.items() <= {
        r.lam.key: r.score for r in exact.rows
    }.items()


def test_what_cannot_be_confirmed_is_refused_before_the_sweep(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="needs the instruct model"):
        check_confirm(spec(tmp_path, instruct=None, delta="file"))
    for store in ("auto", "dense", "sparse"):
        with pytest.raises(UsageError, match="nothing to confirm"):
            check_confirm(spec(tmp_path, store=store))
    pa_fast.encode(BASE, INSTRUCT, tmp_path / "delta", "sparse", select="topk", density=0.01)
    check_confirm(spec(tmp_path, delta=str(tmp_path / "delta")))
    with pytest.raises(PairError, match="encoded from an instruct model of quick fingerprint"):
        check_confirm(spec(tmp_path, delta=str(tmp_path / "delta"), instruct=str(BASE)))


@pytest.mark.parametrize(("format", "rank"), [("packed", None), ("lowrank", 4), ("dense", None)])
def test_another_instruct_model_beside_a_delta_is_refused(
    format: str, rank: int | None, encoded: Callable[..., Path], tmp_path: Path
) -> None:
    job = spec(tmp_path / "run", delta=str(encoded(format, rank)))
    check_beside_delta(job)
    check_beside_delta(replace(job, instruct=None))
    with pytest.raises(PairError, match="encoded from an instruct model of quick fingerprint"):
        check_beside_delta(replace(job, instruct=str(BASE)))


def test_an_instruct_model_beside_the_delta_of_an_adapter_has_no_files_to_compare(
    encoded: Callable[..., Path], tmp_path: Path
) -> None:
    pa_fast.export_lora(encoded("lowrank", 4), BASE, tmp_path / "lora", partial=True)
    pa_fast.encode(BASE, tmp_path / "lora", tmp_path / "back", "lowrank")
    check_beside_delta(spec(tmp_path / "run", delta=str(tmp_path / "back")))


@pytest.mark.parametrize("how", ["store", "delta"])
def test_a_packed_sweep_past_its_range_is_refused_before_its_first_point(
    how: str, encoded: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    given: dict[str, Any] = {"store": "packed"}
    if how == "delta":
        delta = str(encoded("packed"))
        given = {"instruct": None, "delta": delta, "tokenizer": str(INSTRUCT)}
    with pytest.raises(UsageError, match=r"λ = 1\.5 is outside \[0, 1\]") as caught:
        run(spec(out, lambdas="0,0.5,1.5", **given))
    assert "choose λ within it" in str(caught.value.hint) and "--range" in str(caught.value.hint)
    assert not out.exists()
    run(spec(out, lambdas="0.5", **given))
    before = (out / "journal.jsonl").read_bytes()
    with pytest.raises(UsageError, match=r"λ = 1\.5 is outside"):
        run(spec(out, lambdas="0.5,0.25,1.5", **given))
    assert (out / "journal.jsonl").read_bytes() == before


def test_where_a_delta_cannot_go_is_said_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pa_fast.engines.encoding.load_pair", lambda *_: pytest.fail("loaded"))
    (tmp_path / "there").touch()
    for out, overwrite, said, hint in (
        (tmp_path, False, "is a folder, and a delta is one file", f"--out {tmp_path / 'delta'}"),
        (tmp_path, True, "is a folder, and a delta is one file", f"--out {tmp_path / 'delta'}"),
        (tmp_path / "there", False, "exists already", "--overwrite"),
        (Path("/dev/null"), True, "is no file", "another --out"),
    ):
        with pytest.raises(OutputError, match=said) as caught:
            pa_fast.encode(BASE, INSTRUCT, out, overwrite=overwrite)
        assert hint in str(caught.value.hint)


def test_an_adapter_is_exported_for_its_own_base_alone(
    encoded: Callable[..., Path], tmp_path: Path
) -> None:
    delta = encoded("lowrank", 4)
    with pytest.raises(PairError, match="encoded from a base of quick fingerprint"):
        pa_fast.export_lora(delta, INSTRUCT, tmp_path / "lora", partial=True)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").touch()
    with pytest.raises(OutputError, match="not an empty folder"):
        pa_fast.export_lora(delta, BASE, tmp_path / "full", partial=True)
    assert not (tmp_path / "lora").exists()


def test_a_text_that_cannot_be_read_costs_no_encoding(tmp_path: Path) -> None:
    with pytest.raises(EvaluatorError, match="cannot be read"):
        pa_fast.encode(BASE, INSTRUCT, tmp_path / "delta", text=tmp_path / "no")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("format", "options", "why"),
    [
        ("zipped", {}, "format `zipped` is not available"),
        ("packed", {"rank": 3}, "`rank` with format `packed`"),
        ("packed", {"range": (0.2, 1.0)}, "range 0.2:1"),
        ("packed", {"layout": "fast"}, "layout `fast`"),
        ("sparse", {"layout": "speed"}, "`layout` with format `sparse`"),
        ("lowrank", {"density": 0.1}, "`density` with format `lowrank`"),
        ("dense", {"rank": 3}, "`rank` with format `dense`"),
        ("sparse", {"select": "topk"}, "give the share of weights"),
        ("lowrank", {"rank": 8, "energy": 0.5}, "given together"),
    ],
)
def test_options_that_do_not_fit_are_wrong_usage(
    format: str, options: dict[str, Any], why: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError) as caught:
        pa_fast.encode(BASE, INSTRUCT, tmp_path / "delta", format, **options)
    assert why in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format", STORES)
def test_every_format_opens_against_its_own_base_alone(format: str, tmp_path: Path) -> None:
    report = pa_fast.encode(BASE, INSTRUCT, tmp_path / "delta", format)
    assert pa_fast.QualityReport.from_json(report.to_json()) == report
    lm = pa_fast.load(BASE, delta=tmp_path / "delta")
    assert lm.weights.lossless == report.lossless
    with pytest.raises(PairError):
        pa_fast.load(INSTRUCT, delta=tmp_path / "delta")


def test_the_layout_of_packed_codes_is_an_option(tmp_path: Path) -> None:
    reports = {
        layout: pa_fast.encode(BASE, INSTRUCT, tmp_path / layout, layout=layout)
        for layout in ("size", "speed")
    }
    assert [report.options for report in reports.values()] == ["packed", "packed, layout speed"]
    assert reports["speed"].lossless
    kinds = {row.kind for row in reports["speed"].tensors}
    assert "packed8-speed" in kinds and not {"packed8", "packed16"} & kinds
    sums = []
    for layout in reports:
        lm = pa_fast.load(BASE, delta=tmp_path / layout)
        lm.weights.set_lambda(0.3)
        assert lm.weights.verify()
        sums.append(lm.weights.checksum())
    assert sums[0] == sums[1]


def test_a_delta_goes_to_a_lora_folder_and_back(tmp_path: Path) -> None:
    pa_fast.encode(BASE, INSTRUCT, tmp_path / "delta", "lowrank", rank=16)
    with pytest.raises(DataError, match="that a LoRA cannot hold"):
        pa_fast.export_lora(tmp_path / "delta", BASE, tmp_path / "lora")
    made = pa_fast.export_lora(tmp_path / "delta", BASE, tmp_path / "lora", partial=True)
    assert made.ranks and any("norm" in name for name in made.left_out)
    report = pa_fast.encode(BASE, tmp_path / "lora", tmp_path / "back", "lowrank")
    assert report.lossless and report.relative_error == 0
    there, back = (
        pa_fast.load(BASE, delta=tmp_path / name, store="attached") for name in ("delta", "back")
    )
    layer = next(path for path in made.ranks)
    for name in ("u", "v"):
        found, expected = (getattr(lm.model.get_submodule(layer), name) for lm in (back, there))
        assert found.float().equal(expected.float())
    with pytest.raises(UsageError, match="is a LoRA folder"):
        pa_fast.encode(BASE, tmp_path / "lora", tmp_path / "other", "sparse")


@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize("format", sorted(set(STORES) - {"lowrank"}))
def test_a_delta_of_which_nothing_fits_into_a_lora_says_so_at_once(
    format: str, partial: bool, encoded: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="nothing in it fits into a LoRA") as caught:
        pa_fast.export_lora(encoded(format), BASE, tmp_path / "lora", partial=partial)
    assert "--format lowrank" in str(caught.value.hint) and not (tmp_path / "lora").exists()


@pytest.mark.parametrize(
    "rank", [1, 17, *(pytest.param(r, marks=pytest.mark.slow) for r in (8, 15))]
)
def test_a_rank_is_the_rank_of_file_footer_and_lora(rank: int, tmp_path: Path) -> None:
    delta, options = tmp_path / "delta", f"lowrank, rank {rank}, seed 0"
    report = pa_fast.encode(BASE, INSTRUCT, delta, "lowrank", rank=rank)
    kinds = {row.name: row.kind for row in report.tensors}
    with DeltaFile.open(delta) as file:
        assert report.options == file.description.options == options
        entries = [file.entry(name) for name, kind in kinds.items() if kind == "factors"]
    assert entries and {entry.u.shape[-1] for entry in entries} == {rank}
    lm = pa_fast.load(BASE, delta=delta)
    lm.set_lambda(0.3)
    assert lm.weights.verify()
    exported = pa_fast.export_lora(delta, BASE, tmp_path / "lora", partial=True)
    assert set(exported.ranks.values()) == {rank}
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == rank and config["rank_pattern"] == {}


def test_a_lora_folder_names_its_base_so_that_it_is_found_from_anywhere(
    encoded: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(BASE.parent)
    for n, given in enumerate(("base", "../pair/base", Path("base"), str(BASE))):
        pa_fast.export_lora(encoded("lowrank", 4), given, tmp_path / f"lora{n}", partial=True)
        said = json.loads((tmp_path / f"lora{n}" / "adapter_config.json").read_text())
        named = Path(said["base_model_name_or_path"])
        assert named.is_absolute() and named.samefile(BASE)


def test_a_text_shows_what_a_delta_does_to_the_model(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("[rev owgny]>yngwo\n" * 20)  # longer than the model has positions for
    lossy = pa_fast.encode(BASE, INSTRUCT, tmp_path / "a", "lowrank", rank=16, text=text).text
    whole = pa_fast.encode(BASE, INSTRUCT, tmp_path / "b", text=text).text
    assert lossy is not None and whole is not None
    assert [point.lam for point in lossy.points] == ["0.5", "1"] and all(
        point.kl > 0 for point in lossy.points
    )
    assert all((point.kl, point.agreement) == (0, 1) for point in whole.points)
