"""lm-eval's templates, compiled once each: it would compile the same few for every document, at
every λ."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def templates_kept() -> Iterator[None]:
    """Meanwhile `lm_eval.utils.apply_template` finds a template that it has seen before already
    compiled."""
    from lm_eval.utils import env

    env.from_string = _from_string
    try:
        yield
    finally:
        env.__dict__.pop("from_string", None)  # what the class has shows again


def _from_string(source: str, *more: Any, **options: Any) -> Any:
    from lm_eval.utils import env

    return (
        type(env).from_string(env, source, *more, **options)
        if more or options
        else _compiled(source)
    )


@functools.lru_cache(maxsize=1024)
def _compiled(source: str) -> Any:
    from lm_eval.utils import env

    return type(env).from_string(env, source)
