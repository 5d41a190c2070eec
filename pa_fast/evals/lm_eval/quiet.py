"""lm-eval without its bars and log lines: this library draws its own."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Nothing of lm-eval and datasets on stderr but errors."""
    import datasets
    import lm_eval.api.task as building

    logger, bar = logging.getLogger("lm_eval"), building.tqdm
    level, bars = logger.level, not datasets.are_progress_bars_disabled()
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    building.tqdm = functools.partial(bar, disable=True)
    try:
        yield
    finally:
        logger.setLevel(level)
        building.tqdm = bar
        if bars:
            datasets.enable_progress_bars()
