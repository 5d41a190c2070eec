"""A dtype is taken by its name, and as torch has it, wherever one is taken."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import pa_fast
from pa_fast.errors import UsageError

PAIR = Path(__file__).parents[1] / "examples" / "demo" / "pair"
BASE, INSTRUCT = PAIR / "base", PAIR / "instruct"


def merged(out: Path, dtype: Any) -> object:
    report = pa_fast.merge(BASE, INSTRUCT, 0.5, out, dtype=dtype)
    return report.bytes, (out / "pa_fast.json").read_bytes()


def encoded(out: Path, dtype: Any) -> object:
    pa_fast.encode(BASE, INSTRUCT, out, "sparse", dtype=dtype)
    return out.read_bytes()


def loaded(out: Path, dtype: Any) -> object:
    return pa_fast.load(BASE, INSTRUCT, dtype=dtype, endpoint_check=False).identity


TAKE: dict[str, Callable[[Path, Any], object]] = {
    "load": loaded,
    "merge": merged,
    "encode": encoded,
    "inspect": lambda out, dtype: pa_fast.inspect(BASE, INSTRUCT, sample=True, dtype=dtype),
}


@pytest.mark.parametrize("verb", TAKE)
def test_a_dtype_of_torch_is_taken_as_its_name_is(verb: str, tmp_path: Path) -> None:
    take = TAKE[verb]
    assert take(tmp_path / "a", torch.float32) == take(tmp_path / "b", "float32")
    for wrong in (torch.int8, "int8", None):
        with pytest.raises(UsageError, match=f"dtype `{wrong}`: expected auto, bfloat16, float16"):
            take(tmp_path / "c", wrong)
