"""The question of a sweep: the evaluator whose best λ is looked for, its objective, and the shares
of their scores at λ = 1 that others must keep."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pa_fast.errors import UsageError
from pa_fast.foreign import one_line


def full_name(name: str, evaluators: Sequence[str]) -> str:
    """Return the evaluator that is called `name`, or else the only one whose name begins so.

    Raises:
        UsageError: there is none, or there are several; or `name` is no text.
    """
    if not isinstance(name, str):
        raise UsageError(
            f"{one_line(repr(name), 60)} is not the name of an evaluator",
            f"one of: {', '.join(evaluators)}",
        )
    if name in evaluators:
        return name
    matches = [one for one in evaluators if name and one.startswith(name)]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise UsageError(
            f"the names of {len(matches)} evaluators begin with `{name}`",
            f"write one of them whole: {', '.join(matches)}",
        )
    raise UsageError(f"no evaluator is called `{name}`", f"one of: {', '.join(evaluators)}")


def parse_keep(texts: Iterable[str]) -> dict[str, float]:
    """Return evaluator → share of `NAME>=98%` or `NAME>=0.98`.

    Raises:
        UsageError: neither, or a name twice.
    """
    kept: dict[str, float] = {}
    for text in texts:
        match = re.fullmatch(r"(.+?)\s*(?:>=|≥)\s*(\d{1,3}(?:\.\d{1,9})?|\.\d{1,9})\s*(%?)", text)
        if match is None:
            raise UsageError(
                f"`{one_line(text, 60)}` is not NAME>=SHARE", "write for example ifeval>=98%"
            )
        name = match[1].strip()
        if name in kept:
            raise UsageError(f"`{name}` is to keep two shares", "give each evaluator one")
        kept |= shares({name: float(match[2]) / (100 if match[3] else 1)})
    return kept


def shares(keep: Any) -> dict[str, float]:
    """Return a copy of `keep`, evaluator → share; empty for None.

    Raises:
        UsageError: it is no mapping of names to shares in (0, 1].
    """
    if keep is None:
        return {}
    if not isinstance(keep, Mapping):
        raise UsageError(
            f"keep is a {type(keep).__name__}, expected a dict of evaluator → share",
            'write for example keep={"ifeval": 0.98}',
        )
    for name, share in keep.items():
        if not isinstance(name, str):
            raise UsageError(
                f"keep has the key {one_line(repr(name), 60)}, expected the name of an evaluator",
                'write for example keep={"ifeval": 0.98}',
            )
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 1:
            raise UsageError(
                f"`{name}` is to keep {one_line(repr(share), 60)} of its score at λ = 1",
                "give a share such as 0.98",
            )
    return {name: float(share) for name, share in keep.items()}


def check_question(objective: str, keep: Mapping[str, float]) -> None:
    """Raise UsageError where `objective` is to keep a share itself: its best λ is looked for, so it
    is others that pay for it. Both have full names."""
    if objective in keep:
        raise UsageError(
            f"`{objective}` is to keep {100 * keep[objective]:g} % of its score, and is the"
            " objective itself, whose best λ is looked for",
            "let other evaluators keep a share, or name another objective: --objective NAME",
        )
