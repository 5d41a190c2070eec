"""State of this process that an evaluator may change and other scores depend on, and its
restoration.

Weights and model are not part of it: the driver checks them by checksum and by
`Engine.on_weights_changed`. Neither are environment variables, which libraries set when they are
first imported.
"""

from __future__ import annotations

import contextlib
import functools
import os
import pickle
import random
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from pa_fast.errors import RunError

_FP32_PRECISION = tuple(
    f"{part}fp32_precision"
    for part in (
        "",
        "cuda.matmul.",
        "cudnn.",
        "cudnn.conv.",
        "cudnn.rnn.",
        "mkldnn.",
        "mkldnn.matmul.",
        "mkldnn.conv.",
        "mkldnn.rnn.",
    )
)
_FLAGS = (
    ("reduced precision", "cuda.matmul.allow_fp16_reduced_precision_reduction"),
    ("reduced precision", "cuda.matmul.allow_bf16_reduced_precision_reduction"),
    ("reduced precision", "cuda.matmul.allow_fp16_accumulation"),
    ("cuDNN", "cudnn.enabled"),
    ("cuDNN", "cudnn.benchmark"),
    ("cuDNN", "cudnn.deterministic"),
    ("oneDNN", "mkldnn.enabled"),
    ("oneDNN", "mkldnn.deterministic"),
)
_ATTENTION = ("flash", "mem_efficient", "math", "cudnn")


@dataclass(frozen=True)
class _State:
    """One setting: `read` returns a value to compare and to `write` back, None where this process
    does not have it."""

    kind: str
    read: Callable[[], Any]
    write: Callable[[Any], object]


class Restored:
    """A context manager that restores the process state that its block changes, and drops torch's
    cache of casts.

    A child that the block forked is ended when it leaves the block: it would continue the sweep
    beside its parent.

    Attributes:
        changed: after the block, the kinds of state that it had changed, such as `autocast`, each
            once.

    Raises:
        RunError: something cannot be restored; only if the block itself raises nothing.
    """

    def __init__(self, owner: str):
        self.changed: tuple[str, ...] = ()
        self._owner = owner

    def __enter__(self) -> Restored:
        self._process = os.getpid()
        self._before = [
            (state, value) for state in _states() if (value := state.read()) is not None
        ]
        _drop_casts()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if os.getpid() != self._process:
            os.write(2, f"{self._owner} forked a child that did not exit; it ends here\n".encode())
            os._exit(1)
        changed = self._differing()
        self.changed = tuple(dict.fromkeys(state.kind for state, _ in changed))
        for _ in range(2):  # some settings change others, as inference mode does the gradient mode
            if not changed:
                break
            for state, value in changed:
                with contextlib.suppress(Exception):  # what fails still differs
                    state.write(value)
            changed = self._differing()
        _drop_casts()
        if changed and kind is None:
            raise RunError(
                f"{self._owner} changed what cannot be put back:"
                f" {', '.join(dict.fromkeys(state.kind for state, _ in changed))}",
                "mend the evaluator; then run again: finished points are kept",
            )

    def _differing(self) -> list[tuple[_State, Any]]:
        return [(state, value) for state, value in self._before if state.read() != value]


def _states() -> Iterator[_State]:
    """Yield every setting of the packages that are imported; others have not been changed."""
    yield _State("working directory", _folder, os.chdir)
    yield _State("random state", random.getstate, random.setstate)
    yield _State("recursion limit", sys.getrecursionlimit, sys.setrecursionlimit)
    # other filters change what is shown and no score, and libraries add some at import
    yield _State("warnings as errors", _error_filters, _set_error_filters)
    for number in (signal.SIGINT, signal.SIGTERM):
        if threading.current_thread() is threading.main_thread():
            yield _State(
                "signal handler",
                functools.partial(signal.getsignal, number),
                functools.partial(signal.signal, number),
            )
    if (numpy := sys.modules.get("numpy")) is not None:
        generator = numpy.random.mtrand._rand  # the one behind numpy.random.rand and its like
        yield _State(
            "random state",
            lambda: pickle.dumps(generator.get_state(legacy=False)),
            lambda state: generator.set_state(pickle.loads(state)),
        )
        yield _State("NumPy's error handling", numpy.geterr, lambda kept: numpy.seterr(**kept))
    if (torch := sys.modules.get("torch")) is not None:
        yield from _torch_modes(torch)
        yield from _torch_numerics(torch)
        yield from _torch_random(torch)


def _folder() -> str | None:
    with contextlib.suppress(OSError):
        return os.getcwd()
    return None


def _error_filters() -> list[Any]:
    return [filter_ for filter_ in warnings.filters if filter_[0] == "error"]


def _set_error_filters(kept: list[Any]) -> None:
    rest = [filter_ for filter_ in warnings.filters if filter_[0] != "error"]
    warnings.resetwarnings()  # so that the filters are applied to known warnings again
    warnings.filters[:] = [*kept, *rest]  # type: ignore[index]


def _torch_modes(torch: Any) -> Iterator[_State]:
    yield _State(
        "inference mode",
        torch.is_inference_mode_enabled,
        functools.partial(_set_inference_mode, torch),
    )
    yield _State("gradient mode", torch.is_grad_enabled, torch.set_grad_enabled)
    yield _State("anomaly detection", torch.is_anomaly_enabled, torch.set_anomaly_enabled)
    yield _State("default dtype", torch.get_default_dtype, torch.set_default_dtype)
    yield _State(
        "default device", torch.get_default_device, functools.partial(_set_default_device, torch)
    )
    yield _State("torch modes", lambda: len(_modes()), _leave_modes)
    yield _State("autocast", functools.partial(_nesting, torch), functools.partial(_nest, torch))
    yield _State("autocast", torch.is_autocast_cache_enabled, torch.set_autocast_cache_enabled)
    for device in ("cpu", "cuda"):
        for read, write in (
            (torch.is_autocast_enabled, torch.set_autocast_enabled),
            (torch.get_autocast_dtype, torch.set_autocast_dtype),
        ):
            yield _State(
                "autocast", functools.partial(read, device), functools.partial(write, device)
            )


def _torch_numerics(torch: Any) -> Iterator[_State]:
    yield _State("threads", torch.get_num_threads, torch.set_num_threads)
    yield _State("subnormal numbers", lambda: sys.float_info.min / 2 == 0, torch.set_flush_denormal)
    yield _State(
        "deterministic algorithms",
        lambda: (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        ),
        lambda kept: torch.use_deterministic_algorithms(kept[0], warn_only=kept[1]),
    )
    yield _State(
        "matmul precision",
        functools.partial(_precision, torch),
        functools.partial(_set_precision, torch),
    )
    for name in _ATTENTION:
        read, write = (
            getattr(torch.backends.cuda, f, None)
            for f in (f"{name}_sdp_enabled", f"enable_{name}_sdp")
        )
        if read is not None and write is not None:
            yield _State("attention kernels", read, write)
    for kind, flag in _FLAGS:
        yield _State(
            kind, functools.partial(_flag, torch, flag), functools.partial(_set_flag, torch, flag)
        )


def _torch_random(torch: Any) -> Iterator[_State]:
    def kept(state: Any) -> bytes:
        return bytes(state.numpy())

    def tensor(state: bytes) -> Any:
        return torch.frombuffer(bytearray(state), dtype=torch.uint8)

    yield _State(
        "random state",
        lambda: kept(torch.get_rng_state()),
        lambda state: torch.set_rng_state(tensor(state)),
    )
    if torch.cuda.is_initialized():
        yield _State("current GPU", torch.cuda.current_device, torch.cuda.set_device)
        yield _State(
            "random state",
            lambda: [kept(state) for state in torch.cuda.get_rng_state_all()],
            lambda states: torch.cuda.set_rng_state_all([tensor(state) for state in states]),
        )


_inference_modes: list[Any] = []
"""Modes that were entered, kept open: leaving one would set the mode from before it."""


def _set_inference_mode(torch: Any, enabled: bool) -> None:
    _inference_modes.append(torch.inference_mode(enabled))
    _inference_modes[-1].__enter__()


def _set_default_device(torch: Any, device: Any) -> None:
    from torch.overrides import _get_current_function_mode_stack, _pop_mode
    from torch.utils._device import DeviceContext

    # CPU is what None means, without a function mode in every call
    torch.set_default_device(None if device.type == "cpu" else device)
    kept = getattr(torch, "_GLOBAL_DEVICE_CONTEXT", None)
    if kept is not None and getattr(kept, "device_context", kept) is None:
        del kept.device_context  # PyTorch 2.8 cannot read the None that it has just stored
    while torch.get_default_device() != device and isinstance(
        _get_current_function_mode_stack()[-1], DeviceContext
    ):
        _pop_mode()  # a `with torch.device(…)` that was left open


def _modes() -> list[Any]:
    """Return the function and dispatch modes that are active, without those of the default
    device."""
    from torch.overrides import _get_current_function_mode_stack
    from torch.utils._device import DeviceContext
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

    modes = [*_get_current_function_mode_stack(), *_get_current_dispatch_mode_stack()]
    return [mode for mode in modes if not isinstance(mode, DeviceContext)]


def _leave_modes(count: int) -> None:
    while len(modes := _modes()) > count:
        modes[-1].__exit__(None, None, None)


def _nesting(torch: Any) -> int:
    torch.autocast_increment_nesting()
    return int(torch.autocast_decrement_nesting())


def _nest(torch: Any, depth: int) -> None:
    while (now := _nesting(torch)) != depth:
        torch.autocast_decrement_nesting() if now > depth else torch.autocast_increment_nesting()


def _drop_casts() -> None:
    """Drop autocast's cache of cast weights: in a block that is not left, it outlives their λ."""
    if (torch := sys.modules.get("torch")) is not None:
        torch.clear_autocast_cache()


def _precision(torch: Any) -> list[Any]:
    """Return the precision of fp32 products, in both of torch's interfaces to it; the older one
    raises after a use of the newer one."""
    values: list[Any] = []
    for read in (torch.get_float32_matmul_precision, lambda: torch.backends.cudnn.allow_tf32):
        try:
            values.append(read())
        except RuntimeError:
            values.append(None)
    return [*values, *(_flag(torch, path) for path in _FP32_PRECISION)]


def _set_precision(torch: Any, kept: list[Any]) -> None:
    matmul, cudnn, *rest = kept
    if matmul is not None:
        torch.set_float32_matmul_precision(matmul)
    if cudnn is not None:
        torch.backends.cudnn.allow_tf32 = cudnn
    for path, value in zip(_FP32_PRECISION, rest):  # last: the older interface writes them too
        if value is not None:
            _set_flag(torch, path, value)


def _flag(torch: Any, path: str) -> Any:
    """Return `torch.backends.<path>`; None where this version of torch has none."""
    return functools.reduce(
        lambda thing, name: getattr(thing, name, None), path.split("."), torch.backends
    )


def _set_flag(torch: Any, path: str, value: Any) -> None:
    owner, _, name = path.rpartition(".")
    setattr(_flag(torch, owner) if owner else torch.backends, name, value)
