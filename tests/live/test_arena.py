"""Live tensors on a CPU lie together, and are otherwise as if each had been allocated alone."""

from __future__ import annotations

import copy
import gc
import io
import logging
import pathlib
import sys
from itertools import pairwise

import pytest
import torch

import pa_fast
from pa_fast.live.memory import empty_live
from tests.engines.architectures import write_pair

CPU = torch.device("cpu")
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.int64, torch.uint8, torch.bool)


def saved_bytes(tensor: torch.Tensor) -> int:
    file = io.BytesIO()
    torch.save(tensor, file)
    return file.tell()


def test_shapes_of_every_dtype_lie_in_order_and_apart() -> None:
    shapes = [(3, 5), (), (0, 7), (1,), (33,), (2, 3, 4)]
    like = [torch.zeros(shape, dtype=dtype) for dtype in DTYPES for shape in shapes]
    made = empty_live(like, CPU)
    for one, own in zip(like, made):
        assert (own.shape, own.dtype, own.is_contiguous()) == (one.shape, one.dtype, True)
        assert own.storage_offset() == 0 and own.untyped_storage().nbytes() == own.nbytes
    full = [own for own in made if own.numel()]
    addresses = [own.data_ptr() for own in full]
    assert not any(address % 64 for address in addresses) and addresses == sorted(addresses)
    ends = [address + own.nbytes for address, own in zip(addresses, full)]
    assert all(0 <= address - end < 64 for address, end in zip(addresses[1:], ends))
    for number, own in enumerate(full):
        own.fill_(number % 2)
    assert all(bool((own == number % 2).all()) for number, own in enumerate(full)), "none overlaps"
    assert empty_live([], CPU) == []


def test_saving_or_copying_one_takes_no_other() -> None:
    small, large = empty_live([torch.empty(10), torch.empty(100_000)], CPU)
    for tensor in (small, large):
        tensor.zero_()
    assert saved_bytes(small) < 5_000 < saved_bytes(large)
    twin = copy.deepcopy(small).fill_(1)
    assert twin.untyped_storage().nbytes() == 40 and float(small.sum()) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_freed_with_the_last_of_them() -> None:
    def anonymous_bytes() -> int:
        lines = pathlib.Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

    like = torch.empty(1, dtype=torch.uint8).expand(64 * 2**20)
    first, last = empty_live([like, like], CPU)
    first.fill_(1)
    last.fill_(3)
    both = anonymous_bytes()
    del first
    gc.collect()
    assert anonymous_bytes() > both - 16 * 2**20 and int(last[-1]) == 3
    del last
    gc.collect()
    assert anonymous_bytes() < both - 112 * 2**20


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt-2"])
def test_a_loaded_pair_is_saved_moved_and_copied_as_any_model(
    name: str, tmp_path: pathlib.Path, logged: list[logging.LogRecord]
) -> None:
    from transformers import AutoModelForCausalLM

    lm = pa_fast.load(*write_pair(tmp_path, name), device="cpu")
    lm.set_lambda(0.3)
    expected = {key: value.clone() for key, value in lm.model.state_dict().items()}
    parameters = sorted(lm.model.parameters(), key=torch.Tensor.data_ptr)
    gaps = [b.data_ptr() - a.data_ptr() - a.nbytes for a, b in pairwise(parameters)]
    assert all(0 <= gap < 64 for gap in gaps), "one piece of memory"
    is_tied = bool(lm.model.config.tie_word_embeddings)
    head, embedding = lm.model.get_output_embeddings(), lm.model.get_input_embeddings()
    assert (head.weight is embedding.weight) == is_tied
    twin = copy.deepcopy(lm.model)
    lm.model.save_pretrained(tmp_path / "saved")
    assert not [record for record in logged if "shared" in record.getMessage()]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", trust_remote_code=False)
    lm.set_lambda(0.9)
    for model in (twin, again):
        found = model.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], value) for key, value in expected.items())
    lm.model.to(torch.float64)
    assert all(parameter.dtype == torch.float64 for parameter in lm.model.parameters())
    assert (head.weight is embedding.weight) == is_tied
