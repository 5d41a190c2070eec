"""Interrupts at every place where Python can raise one, one after another: no luck is needed to
meet the worst."""

from __future__ import annotations

import sys
from collections.abc import Callable


def interrupted_at(event: int, work: Callable[[], object]) -> bool:
    """Call `work`, interrupt it at the `event`-th place where Python looks for signals, and return
    whether there were as many: as a function begins, and behind each call of C."""
    left = event

    def strike(frame: object, kind: str, argument: object) -> None:
        nonlocal left
        if kind in ("call", "c_return"):
            left -= 1
            if left == 0:
                sys.setprofile(None)
                raise KeyboardInterrupt

    sys.setprofile(strike)
    try:
        work()
    except KeyboardInterrupt:
        pass
    finally:
        sys.setprofile(None)
    return left <= 0
