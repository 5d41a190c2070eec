"""The figure of stores: the same bytes for the same reports, whatever the user's settings; what is
lossless is left out."""

from __future__ import annotations

import pathlib
from dataclasses import replace

import pytest

from pa_fast.errors import UsageError
from pa_fast.quality import figure
from pa_fast.quality.figure import StoreCurve
from pa_fast.stores.quality import Divergence, OnText, QualityReport

pytestmark = pytest.mark.draws

DENSE = QualityReport("dense", "dense", True, 10, 20, 2.0, 0.0, 1.0, 0.0, 1.0, ())


def point(size: float, error: float, kl: float | None = None) -> QualityReport:
    text = (
        None
        if kl is None
        else OnText("", 9, 4, 2, (Divergence("0.5", 9.0, 0.5), Divergence("1", kl, 0.5)))
    )
    return replace(DENSE, lossless=False, bytes_per_parameter=size, relative_error=error, text=text)


def curves(kl: bool = True) -> list[StoreCurve]:
    return [
        StoreCurve(
            "low rank", [(str(k), point(k / 8, 1 / k, 1 / k if kl else None)) for k in (1, 2, 4, 8)]
        ),
        StoreCurve(
            "sparse",
            [
                ("0.01", point(0.1, 0.9, 2.0 if kl else None)),
                ("1", point(2.0, 0.0, 0.0 if kl else None)),
            ],
        ),
    ]


def test_equal_reports_give_equal_files(tmp_path: pathlib.Path) -> None:
    import matplotlib

    figure.write(curves(), DENSE, tmp_path / "a")
    with matplotlib.rc_context(
        {"font.size": 30, "savefig.dpi": 30, "svg.hashsalt": None, "legend.fontsize": 3}
    ):
        figure.write(curves(), DENSE, str(tmp_path / "b.1"))
    for kind in ("svg", "png"):
        assert (tmp_path / f"a.{kind}").read_bytes() == (tmp_path / f"b.1.{kind}").read_bytes()
    assert int.from_bytes((tmp_path / "a.png").read_bytes()[16:20], "big") == 2000


@pytest.mark.parametrize("kl", [True, False])
def test_points_lie_where_the_reports_say(kl: bool) -> None:
    axes = figure.draw(curves(kl), DENSE).axes
    assert len(axes) == 1 + kl
    low_rank, sparse, dense = axes[0].lines
    assert low_rank.get_xydata().tolist() == [[k / 8, 1 / k] for k in (1, 2, 4, 8)]
    assert sparse.get_xydata().tolist() == [[0.1, 0.9]], "what loses nothing has no logarithm"
    assert dense.get_xdata() == [2.0, 2.0] and axes[0].get_xscale() == axes[0].get_yscale() == "log"
    labels = {text.get_text() for text in axes[0].texts}
    assert labels == {"1", "2", "4", "8", "0.01", "dense, exact"}
    if kl:
        assert (
            axes[1].lines[1].get_xydata().tolist() == [[0.1, 2.0]]
            and "λ = 1" in axes[1].get_title()
        )


def test_one_point_is_drawn_and_no_point_is_refused(tmp_path: pathlib.Path) -> None:
    figure.write([StoreCurve("one", [("a", point(1, 0.5))])], DENSE, tmp_path / "few")
    assert (tmp_path / "few.svg").stat().st_size > 1000
    for given in ([], [StoreCurve("dense", [("", DENSE)])]):
        with pytest.raises(UsageError, match="nothing to draw"):
            figure.draw(given, DENSE)
