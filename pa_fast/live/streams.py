"""The order of switches and forward passes that are queued on different streams of a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


class StreamOrder:
    """Devices on which work on live tensors runs in the order in which it is queued, whatever the
    stream.

    A model computes on its device's default stream unless its owner says otherwise. So work on live
    tensors waits for what that stream has queued, and what it queues later waits for that work; one
    such work waits for the one before. Forward passes on further streams are for their owner to
    order.

    Args:
        devices: of the live tensors; those that are no GPU need no order.

    Cost: on the default stream one recorded event per device and work; the host never waits.
    """

    def __init__(self, devices: Iterable[torch.device]):
        self._devices = [device for device in dict.fromkeys(devices) if device.type == "cuda"]
        self._last: dict[torch.device, Any] = {}

    @contextlib.contextmanager
    def ordered(self) -> Iterator[None]:
        """Order what the block queues on the current streams."""
        if not self._devices:
            yield
            return
        from torch import cuda

        for device in self._devices:
            current, default = cuda.current_stream(device), cuda.default_stream(device)
            if current != default:
                current.wait_stream(default)
            if device in self._last:
                current.wait_event(self._last[device])
        try:
            yield
        finally:
            for device in self._devices:
                current, default = cuda.current_stream(device), cuda.default_stream(device)
                self._last[device] = current.record_event()
                if current != default:
                    default.wait_event(self._last[device])
