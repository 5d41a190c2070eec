"""What the lm-eval tests share: local tasks, the demo pair as an engine, and a cache of data sets
that goes away."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import pa_fast
from tests.evals.harness_tasks import BATCH, PAIR, write_tasks


@pytest.fixture(scope="module")
def lm_eval(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """lm-eval is here, data sets are cached in a folder that goes away, and one thread makes sums
    those of any process."""
    for package in ("lm_eval", "accelerate"):
        pytest.importorskip(package)
    import datasets
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tasks(lm_eval: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of local lm-eval tasks."""
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def engine(lm_eval: None) -> Any:
    """The demo pair."""
    return pa_fast.load(*PAIR, batch_size=BATCH, endpoint_check=False)
