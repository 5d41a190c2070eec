"""Stores on a pair: KL and agreement are those of numpy, nothing between a model and itself,
whatever the batches."""

from __future__ import annotations

import pathlib

import numpy as np
import pytest
import torch

import pa_fast
from examples import choose_store
from pa_fast.base import Lambda
from pa_fast.errors import EngineError, EvaluatorError, UsageError
from pa_fast.evals.perplexity import windows
from pa_fast.quality.divergence import divergence, kl_terms
from pa_fast.quality.reports import on_text, reports
from pa_fast.stores.dense import DenseStore
from pa_fast.stores.quality import QualityReport
from pa_fast.stores.sparse import SparseStore

pytestmark = pytest.mark.draws

DEMO = pathlib.Path(choose_store.DEMO)
PAIR = (DEMO / "pair" / "base", DEMO / "pair" / "instruct")
TEXT = "brick>kcirb\nplant>tnalp\n[rev brick]kcirb\nowgny>yngwo\n"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def models() -> tuple[pa_fast.LambdaModel, pa_fast.LambdaModel]:
    return pa_fast.load(*PAIR), pa_fast.load(*PAIR, store=SparseStore("topk", 0.1))


Models = tuple[pa_fast.LambdaModel, pa_fast.LambdaModel]


def test_kl_and_agreement_are_those_of_numpy(models: Models) -> None:
    ids = models[0].tokenizer.encode(TEXT, add_special_tokens=False)
    pairs = windows(ids, models[0].tokenizer.bos_token_id, 16, 6)
    assert sum(len(scored) for _, scored in pairs) == len(ids)
    found = divergence(*models, pairs, Lambda("0.5"), batch_size=3)
    kl, agreed = [], []
    for context, scored in pairs:
        row = torch.tensor([context + scored])
        with torch.no_grad():
            z = [
                m.model(row).logits[0, len(context) - 1 : -1].float().double().numpy()
                for m in models
            ]
        p, q = (np.exp(x - x.max(1, keepdims=True)) for x in z)
        p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
        kl += list((p * np.log(p / q)).sum(1))
        agreed += list(p.argmax(1) == q.argmax(1))
    assert found.lam == "0.5" and found.kl > 0.1 and 0.1 < found.agreement < 1
    # bf16 logits of a padded batch round otherwise
    assert found.kl == pytest.approx(np.mean(kl), rel=0.03)
    assert found.agreement == pytest.approx(np.mean(agreed), abs=2.5 / len(ids))
    assert all(model.lam == 0.5 for model in models)


def test_a_batch_of_one_gives_the_numbers_to_the_last_digits(models: Models) -> None:
    pairs = windows(models[0].tokenizer.encode(TEXT, add_special_tokens=False), 1, 200, 100)
    ((context, scored),) = pairs
    found = divergence(*models, pairs, Lambda(1), batch_size=8)
    with torch.no_grad():
        z = [m.model(torch.tensor([context + scored[:-1]])).logits[0].double() for m in models]
    p, q = (torch.log_softmax(x, -1) for x in z)
    assert found.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-5)
    assert found.agreement == float((p.argmax(-1) == q.argmax(-1)).double().mean())


def test_excluded_tokens_add_nothing_and_nan_is_not_hidden() -> None:
    p, q = torch.log(torch.tensor([0.5, 0.5, 0.0])), torch.log(torch.tensor([0.25, 0.75, 0.0]))
    assert float(kl_terms(p, q).sum()) == pytest.approx(0.5 * np.log(2) + 0.5 * np.log(0.5 / 0.75))
    assert bool(kl_terms(torch.tensor([torch.nan]), torch.zeros(1)).isnan())


@pytest.mark.parametrize("store", [DenseStore(), SparseStore()])
def test_nothing_is_between_a_model_and_itself(
    store: DenseStore | SparseStore, text: pathlib.Path
) -> None:
    (found,) = reports(*PAIR, [store], text, window=16, stride=6, batch_size=3)
    assert found.text is not None and [point.lam for point in found.text.points] == ["0.5", "1"]
    assert {(point.kl, point.agreement) for point in found.text.points} == {(0.0, 1.0)}
    assert (found.relative_error, found.energy, found.lossless) == (0.0, 1.0, True)
    assert found.text.tokens == len(TEXT) and QualityReport.from_json(found.to_json()) == found


def test_more_bytes_lose_less(text: pathlib.Path) -> None:
    few, many = reports(
        *PAIR,
        [SparseStore("topk", 0.02), SparseStore("topk", 0.3)],
        text,
        lambdas=[1],
        window=200,
        stride=100,
    )
    assert few.text and many.text and few.bytes < many.bytes
    assert (
        few.relative_error > many.relative_error
        and few.text.points[0].kl > many.text.points[0].kl > 0
    )


def test_without_a_text_only_the_weights_are_compared() -> None:
    (found,) = reports(*PAIR, ["lowrank"])
    assert (
        found.text is None
        and 0 < found.relative_error < 1
        and found.options == "lowrank, rank 64, seed 0"
    )
    assert abs(found.energy - (1 - found.relative_error**2)) < 1e-3


def test_what_cannot_be_read_or_cut_is_refused(
    models: Models, tmp_path: pathlib.Path, text: pathlib.Path
) -> None:
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(EvaluatorError, match="cannot be read"):
        next(reports(*PAIR, ["sparse"], tmp_path / "none.txt"))
    with pytest.raises(EvaluatorError, match="no token to score"):
        on_text(*models, tmp_path / "empty.txt")
    with pytest.raises(UsageError, match="stride"):
        on_text(*models, text, window=8, stride=8)
    with pytest.raises(UsageError, match="store `zip`"):
        next(reports(*PAIR, ["zip"]))
    (tmp_path / "long.txt").write_text("a" * 300)
    with pytest.raises(EngineError, match="positions for 256"):
        on_text(*models, tmp_path / "long.txt", window=400, stride=10)


def test_the_program_prints_and_draws(
    tmp_path: pathlib.Path, text: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [
        "--text",
        str(text),
        "--ranks",
        "16",
        "--densities",
        "0.1",
        "--dare",
        "--out",
        str(tmp_path / "stores"),
    ]
    found = choose_store.main(asked)
    assert set(found) == {"dense", "lowrank, rank 16, seed 0", "sparse topk, density 0.1 tensor"}
    printed = capsys.readouterr().out
    assert all(options in printed for options in found) and "λ 0.5: 0, 1.000" in printed
    assert (tmp_path / "stores.png").exists() and (tmp_path / "stores.svg").exists()
