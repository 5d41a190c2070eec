"""A pytest plugin under which tests marked `gpu` run without a GPU: `TRITON_INTERPRET=1 pytest -p
tests.without_gpu`.

Every `cuda` that is asked for is the CPU, kernels run under Triton's interpreter, and its fma is
the reference's, which rounds once. So their arithmetic is tested on any data, and so is what is
around the kernels; what a device alone has is not, and tests of that are marked `gpu(only=…)`. Code
that looks at the type of a tensor's device sees `cpu`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode


class OnCpu(TorchFunctionMode):
    """Calls of torch that are asked for a CUDA device, on the CPU. A copy to the device is a copy,
    as it is there."""

    def __torch_function__(
        self,
        function: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        name = getattr(function, "__name__", "")
        if name == "cuda":
            return args[0].clone()
        named = {key: on_cpu(value) for key, value in (kwargs or {}).items()}
        placed = tuple(map(on_cpu, args))
        moves = name == "to" and any(a is not b for a, b in zip(args, placed))
        if moves or (name == "to" and named.get("device") is not (kwargs or {}).get("device")):
            named["copy"] = True
        return function(*placed, **named)


def on_cpu(value: Any) -> Any:
    """The CPU, where `value` names a CUDA device; else itself."""
    is_cuda = (isinstance(value, str) and value.split(":")[0] == "cuda") or (
        isinstance(value, torch.device) and value.type == "cuda"
    )
    return torch.device("cpu") if is_cuda else value


class Stream:
    """A stream whose work is done when it is given: whatever order is asked for, it has."""

    def __init__(self, device: object = None):
        self.device = torch.device("cpu")

    def wait_stream(self, other: Stream) -> None: ...

    def wait_event(self, event: Event) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self, event: Event | None = None) -> Event:
        return event or Event()


class Event:
    """An event that has come."""

    def __init__(self, **options: bool): ...

    def record(self, stream: Stream | None = None) -> None: ...

    def wait(self, stream: Stream | None = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


@contextlib.contextmanager
def _nothing(*_: object) -> Iterator[None]:
    yield


CUDA: dict[str, Any] = {
    "is_available": lambda: True,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "current_stream": Stream,
    "default_stream": Stream,
    "stream": _nothing,
    "device": _nothing,
    "Stream": Stream,
    "Event": Event,
    "empty_cache": lambda: None,
    "synchronize": lambda device=None: None,
    "mem_get_info": lambda device=None: (1 << 33, 1 << 34),
    "get_device_name": lambda device=None: "none",
}
"""What stands for torch.cuda's own."""


def fused_multiply_add() -> tuple[type, Any]:
    """Triton's interpreter, and an fma for it that rounds once, as a GPU's does; its own rounds
    twice."""
    import numpy as np
    from pa_kernels import reference
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        parts = (torch.from_numpy(np.array(part.data, dtype=np.float32)) for part in (x, y, z))
        return TensorHandle(reference.fma(*parts).numpy(), z.dtype.scalar)

    return InterpreterBuilder, fma


def pytest_configure() -> None:
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise pytest.UsageError("tests.without_gpu: set TRITON_INTERPRET=1, to interpret kernels")


@pytest.fixture(autouse=True, scope="session")
def gpu_that_is_the_cpu() -> Iterator[None]:
    """For a whole session: fixtures of modules ask for devices, too."""
    with pytest.MonkeyPatch.context() as patched:
        for name, value in CUDA.items():
            patched.setattr(torch.cuda, name, value)
        builder, fma = fused_multiply_add()
        patched.setattr(builder, "create_fma", fma)
        with OnCpu():
            yield


def pytest_runtest_setup(item: pytest.Item) -> None:
    # inputs of numpy's, whose warnings a GPU does not have
    item.add_marker(pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning"))
