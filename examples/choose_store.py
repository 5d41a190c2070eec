"""Which lossy store, and how much of it? Error and KL against bytes, over ranks and densities, as a
table and a figure.

python -m examples.choose_store                            # the demo pair, into docs/images
python -m examples.choose_store BASE INSTRUCT --text FILE --out stores
"""

from __future__ import annotations

import argparse
import json
import pathlib
import tempfile
from collections.abc import Sequence

from pa_fast.quality.figure import StoreCurve, write
from pa_fast.quality.reports import reports
from pa_fast.stores.dense import DenseStore
from pa_fast.stores.lowrank import LowRankStore
from pa_fast.stores.quality import QualityReport
from pa_fast.stores.sparse import SparseStore

DEMO = pathlib.Path(__file__).parent / "demo"
SIDES = ("base", "instruct")
IMAGE = DEMO.parents[1] / "docs" / "images" / "stores"
RANKS = (16, 32, 48, 64, 80)
"""Multiples of 16, which every rank is rounded up to."""
DENSITIES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
DARE = (0.1, 0.2, 0.5)


def main(arguments: Sequence[str] | None = None) -> dict[str, QualityReport]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "pair",
        nargs="*",
        metavar="BASE INSTRUCT",
        default=[str(DEMO / "pair" / side) for side in SIDES],
    )
    parser.add_argument(
        "--text", help="UTF-8 file to compare the models on; of the demo pair its evaluation items"
    )
    parser.add_argument("--ranks", type=int, nargs="*", default=RANKS)
    parser.add_argument("--densities", type=float, nargs="*", default=DENSITIES)
    parser.add_argument("--dare", type=float, nargs="*", default=DARE, help="densities of DARE")
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument(
        "--out",
        help=(
            "figure, without .svg and .png; of the demo pair the one in docs/images, else `stores`"
        ),
    )
    options = parser.parse_args(arguments)
    if len(options.pair) != 2:
        parser.error("give BASE and INSTRUCT, or neither for the demo pair")
    demo = options.pair == parser.get_default("pair")
    out = options.out or (IMAGE if demo else "stores")
    stores = {
        "low rank, by rank": {f"{rank}": LowRankStore(rank=rank) for rank in options.ranks},
        "sparse top-k, by density": {
            f"{density:g}": SparseStore("topk", density) for density in options.densities
        },
        "sparse DARE, by density": {
            f"{density:g}": SparseStore("dare", density) for density in options.dare
        },
    }
    with tempfile.TemporaryDirectory() as folder:
        text = options.text or (demo_text(pathlib.Path(folder) / "demo.txt") if demo else None)
        every = [
            DenseStore(),
            *(store for settings in stores.values() for store in settings.values()),
        ]
        made = iter(
            reports(*options.pair, every, text, window=options.window, stride=options.window // 2)
        )
        print(
            f"{'store':36} {'B/param':>8} {'error':>7} {'energy':>7}   KL (nats) and agreement at"
            " each λ"
        )
        found = {}
        for report in made:
            found[report.options] = report
            said = (
                "  ".join(f"λ {p.lam}: {p.kl:.3g}, {p.agreement:.3f}" for p in report.text.points)
                if report.text
                else ""
            )
            sizes = (
                f"{report.bytes_per_parameter:8.3f} {report.relative_error:7.3f}"
                f" {report.energy:7.3f}"
            )
            print(f"{report.options:36} {sizes}   {said}", flush=True)
    curves = [
        StoreCurve(name, [(label, found[store.describe()]) for label, store in settings.items()])
        for name, settings in stores.items()
        if settings
    ]
    write(curves, found[DenseStore().describe()], out)
    print(f"figure: {out}.svg and .png")
    return found


def demo_text(path: pathlib.Path) -> str:
    """What the demo's models are evaluated on, as one text: shown examples, then requests and their
    answers."""
    rows = [
        json.loads(line)
        for name in ("fewshot", "requests")
        for line in (DEMO / f"{name}.jsonl").read_text().splitlines()
    ]
    path.write_text("".join(f"{row['prompt']}{row['answer']}\n" for row in rows), encoding="utf-8")
    return str(path)


if __name__ == "__main__":
    main()
