"""Items of scores: in one order, checked against the reported value, or refused with the reason."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pa_fast.base import Item, Lambda, Score
from pa_fast.errors import StatisticsError
from pa_fast.stats import items as module
from pa_fast.stats.items import Column, Items

RNG = np.random.default_rng(0)


def collect(scores: Mapping[Lambda, Score], higher_is_better: bool) -> Items:
    return module.collect({lam: Column.of(s) for lam, s in scores.items()}, higher_is_better)


SIZES = {"a": 4, "b": 7, "c": 2}
NAMES = [(group, str(k)) for group, size in SIZES.items() for k in range(size)]


def micro(items: Sequence[Item]) -> float:
    return sum(i.score * i.weight for i in items) / sum(i.weight for i in items)


def macro(items: Sequence[Item]) -> float:
    groups = sorted({i.group for i in items})
    return sum(micro([i for i in items if i.group == g]) for g in groups) / len(groups)


def scored(
    make: Callable[[str, str, int], Item],
    value: Callable[[Sequence[Item]], float] = micro,
    names: Sequence[tuple[str, str]] = NAMES,
    count: int = 3,
) -> dict[Lambda, Score]:
    """Scores at λ = 0, …, 1 of the items that `make` makes of group, id and number of λ."""
    found = {}
    for k in range(count):
        items = [make(group, id, k) for group, id in names]
        found[Lambda(k) if count == 1 else Lambda(k / (count - 1))] = Score(
            value(items), "u", len(items), items
        )
    return found


def random_item(group: str, id: str, k: int) -> Item:
    return Item(id, group, float(RNG.integers(2)))


@pytest.mark.parametrize("value", [micro, macro])
def test_items_make_up_the_mean_over_items_or_over_groups(value: Callable[..., float]) -> None:
    scores = scored(random_item, value)
    items = collect(scores, True)
    assert items.y.shape == (13, 3) and items.weights.sum() == pytest.approx(1)
    assert items.values() == pytest.approx([score.value for score in scores.values()], abs=1e-12)
    assert sorted(items.counts) == sorted(SIZES.values())


def test_weights_make_up_a_weighted_mean() -> None:
    scores = scored(lambda g, i, k: Item(i, g, float(RNG.random()), weight=1.0 + int(i)))
    items = collect(scores, True)
    assert items.values() == pytest.approx([score.value for score in scores.values()], abs=1e-12)
    assert np.ptp(items.weights) > 0


def test_costs_change_their_sign() -> None:
    scores = scored(random_item)
    assert collect(scores, False).values() == pytest.approx(-collect(scores, True).values())


@settings(max_examples=30)
@given(st.permutations(range(13)), st.permutations(range(3)))
def test_the_order_of_items_and_of_λ_does_not_matter(
    rows: Sequence[int], lams: Sequence[int]
) -> None:
    rng = np.random.default_rng(1)
    scores = scored(lambda g, i, k: Item(i, g, float(rng.random())), macro)
    keys = list(scores)
    mixed = {}
    for place, lam in enumerate(keys[k] for k in lams):
        items = scores[lam].items if place == 0 else [scores[lam].items[row] for row in rows]
        mixed[lam] = Score(scores[lam].value, "u", 13, items)
    assert np.array_equal(collect(scores, True).y, collect(mixed, True).y)


def test_strata_of_one_item_are_merged_and_the_value_stays() -> None:
    names = [*NAMES, ("d", "0"), ("e", "0")]
    several = collect(scored(random_item, macro, names), True)
    assert sorted(several.counts) == [2, 2, 4, 7]
    one = collect(scored(random_item, macro, [*NAMES, ("d", "0")]), True)
    assert sorted(one.counts) == [3, 4, 7], "a single one joins the smallest"


def f1(items: Sequence[Item]) -> float:
    tp, fp, fn = (sum((i.parts or {})[p] for i in items) for p in ("tp", "fp", "fn"))
    return 2 * tp / (2 * tp + fp + fn)


def of_groups(value: Callable[[Sequence[Item]], float]) -> Callable[[Sequence[Item]], float]:
    def mean(items: Sequence[Item]) -> float:
        groups = sorted({i.group for i in items})
        return float(np.mean([value([i for i in items if i.group == g]) for g in groups]))

    return mean


def labelled(parts: Sequence[str]) -> Callable[[str, str, int], Item]:
    def make(group: str, id: str, k: int) -> Item:
        gold, said = int(id) % 2, int(RNG.integers(2))
        cell = {"tp": gold and said, "fp": said and not gold, "fn": gold and not said}
        cell["tn"] = not gold and not said
        # a group counts what its items weigh together: the same for each
        weight = 1 / SIZES[group]
        return Item(id, group, float(gold == said), weight, {p: float(cell[p]) for p in parts})

    return make


def test_f1_of_groups_is_made_up_of_counts() -> None:
    scores = scored(labelled(("tp", "fp", "fn")), of_groups(f1))
    items = collect(scores, True)
    assert items.values() == pytest.approx([score.value for score in scores.values()], abs=1e-12)


def test_matthews_correlation_is_made_up_of_counts() -> None:
    from sklearn.metrics import matthews_corrcoef

    def value(items: Sequence[Item]) -> float:
        gold = [int(i.id) % 2 for i in items]
        return float(
            matthews_corrcoef(gold, [g if i.score else 1 - g for g, i in zip(gold, items)])
        )

    scores = scored(labelled(("tp", "fp", "fn", "tn")), of_groups(value))
    items = collect(scores, True)
    assert items.values() == pytest.approx([score.value for score in scores.values()], abs=1e-9)


def test_tasks_of_different_metrics_are_averaged() -> None:
    counts = labelled(("tp", "fp", "fn"))

    def make(group: str, id: str, k: int) -> Item:
        item = counts(group, id, k)
        if group == "a":
            return item
        return replace(item, parts={"numerator": item.score, "denominator": 1.0})

    def value(items: Sequence[Item]) -> float:
        return f1(items) if items[0].group == "a" else micro(items)

    scores = scored(make, of_groups(value))
    items = collect(scores, True)
    assert items.values() == pytest.approx([score.value for score in scores.values()], abs=1e-12)
    assert [len(formula.parts) for formula in items.formulas] == [3, 2, 2]
    part = items.take(np.repeat([False, True, True], items.counts))
    assert part.values() == pytest.approx(part.take(np.ones(len(part.y), bool)).values())


def test_perplexity_is_made_up_of_nats_and_tokens() -> None:
    def make(group: str, id: str, k: int) -> Item:
        tokens = 5.0 + int(id)
        nats = tokens * float(RNG.random())
        return Item(id, group, nats / tokens, tokens, {"nats": nats, "tokens": tokens})

    scores = scored(make, lambda items: float(np.exp(micro(items))))
    items = collect(scores, False)
    assert items.values() == pytest.approx([-score.value for score in scores.values()], rel=1e-12)


def item_of(**fields: object) -> Callable[[str, str, int], Item]:
    return lambda g, i, k: Item(i, g, float(k), **fields)  # type: ignore[arg-type]


REFUSED: Mapping[str, tuple[dict[Lambda, Score], str]] = {
    "no items": ({Lambda(0): Score(0.5, "u", 4)}, "has no items"),
    "one item": (scored(random_item, micro, NAMES[:1]), "has 1 item"),
    "another value": (
        scored(random_item, lambda items: micro(items) + 2e-9),
        "do not make up the score: at λ = ",
    ),
    "a value of one group": (
        scored(random_item, lambda items: micro(items[:4]) + 0.1),
        "do not make up the score",
    ),
    "other items at one λ": (
        scored(lambda g, i, k: Item(f"{i}{k == 2}", g, 1.0)),
        "the items at λ = 1 are not those of the other λ",
    ),
    "fewer items at one λ": (
        {**scored(random_item), Lambda(1): Score(1.0, "u", 1, [Item("0", "a", 1.0)])},
        "the items at λ = 1 are not those of the other λ",
    ),
    "weights along λ": (
        scored(lambda g, i, k: Item(i, g, 1.0, weight=1.0 + (k == 1))),
        "the weights of items at λ = 0.5 are not those",
    ),
    "a negative weight": (scored(item_of(weight=-1.0)), "weights of items are not all finite"),
    "unknown parts": (scored(item_of(parts={"hits": 1.0})), "items have the parts hits"),
    "parts of some": (
        scored(lambda g, i, k: Item(i, g, 1.0, parts={"nats": 1, "tokens": 1} if k else None)),
        "items have the parts nats, tokens and none",
    ),
    "parts of two kinds in a group": (
        scored(
            lambda g, i, k: Item(
                i,
                g,
                1.0,
                parts=dict.fromkeys(("nats", "tokens") if int(i) else ("tp", "fp", "fn"), 1),
            )
        ),
        "items of one group have different parts",
    ),
    "perplexities among other metrics": (
        scored(
            lambda g, i, k: Item(
                i,
                g,
                1.0,
                parts=dict.fromkeys(("nats", "tokens") if g == "a" else ("tp", "fp", "fn"), 1),
            )
        ),
        "perplexities and other metrics are averaged",
    ),
    "parts that are not finite": (
        scored(item_of(parts={"nats": float("nan"), "tokens": 1})),
        "parts of items are not all finite",
    ),
    "parts of another value": (scored(labelled(("tp", "fp", "fn"))), "do not make up the score"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_items_that_do_not_make_up_the_score_are_refused(case: str) -> None:
    scores, message = REFUSED[case]
    with pytest.raises(StatisticsError, match=message):
        collect(scores, True)


def test_a_part_of_the_items_keeps_what_each_stratum_counts() -> None:
    scores = scored(lambda g, i, k: Item(i, g, float(g == "b")), macro)
    items = collect(scores, True)
    rows = np.ones(13, bool)
    rows[:3] = rows[6:9] = False
    part = items.take(rows)
    assert part.weights.sum() == pytest.approx(1) and len(part.y) == 7
    assert part.values() == pytest.approx(items.values())
    lost = items.take(np.repeat([False, True, True], items.counts))
    assert len(lost.starts) == 2 and lost.values() == pytest.approx(0.5)


def test_the_floor_is_the_worth_of_the_heaviest_item() -> None:
    assert collect(scored(random_item), True).floor == pytest.approx(1 / 13)
    assert collect(scored(random_item, macro), True).floor == pytest.approx(1 / 6)
    hundred = scored(lambda g, i, k: Item(i, g, 100.0 * RNG.integers(2)), macro)
    assert collect(hundred, True).floor == pytest.approx(100 / 6), "in the unit of the score"
    same = collect(scored(lambda g, i, k: Item(i, g, 1.0)), True)
    assert same.floor == pytest.approx(1 / 6), "also where no item changes"


def test_some_λ_of_the_items() -> None:
    items = collect(scored(labelled(("tp", "fp", "fn")), of_groups(f1)), True)
    part = items.select([0, 2])
    assert part.lams.tolist() == [0, 1] and part.values() == pytest.approx(items.values()[[0, 2]])
