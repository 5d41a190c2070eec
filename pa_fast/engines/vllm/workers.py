"""Calls to the workers of one `vllm.LLM`."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any

from pa_fast.engines.served.weights import Workers
from pa_fast.errors import EngineError, PaFastError, first_line

Rpc = Callable[..., list[Any]]
"""`collective_rpc(method, args=…)`: the results of all workers, by rank."""

_LOOK_S = 0.5
"""How often a call looks whether vLLM's process lives."""


class RpcWorkers(Workers):
    """Workers of vLLM, by its RPC.

    Args:
        rpc: `vllm.LLM.collective_rpc`.
        died: returns whether vLLM's own process has died; None where it has none.
    """

    engine = "vLLM"

    def __init__(self, rpc: Rpc, died: Callable[[], bool] | None = None):
        self._rpc, self._died = rpc, died

    def answers(self, method: str, arguments: tuple[Any, ...]) -> list[dict[str, Any]]:
        """See `Workers.answers`.

        Raises:
            EngineError: a worker has no such calls, or died.
        """
        try:
            return self._waited(method, arguments)
        except PaFastError:
            raise
        except Exception as error:  # vLLM's own, of many kinds
            raise _of_vllm(error) from error

    def _waited(self, method: str, arguments: tuple[Any, ...]) -> list[Any]:
        """Where vLLM has a process of its own, the call waits for ever if that dies meanwhile: so
        another thread waits, and this one looks whether it lives."""
        if self._died is None:
            return self._rpc("pa_call", args=(method, *arguments))
        outcome: Future[list[Any]] = Future()

        def wait() -> None:
            try:
                outcome.set_result(self._rpc("pa_call", args=(method, *arguments)))
            except BaseException as error:
                outcome.set_exception(error)

        threading.Thread(target=wait, name="pa_fast vLLM call", daemon=True).start()
        while True:
            try:
                return outcome.result(timeout=_LOOK_S)
            except FutureTimeout:
                if not outcome.done() and self._died():
                    raise RuntimeError("vLLM's process died during the call") from None


def _of_vllm(error: Exception) -> EngineError:
    """Return what an exception of vLLM's RPC means."""
    text = first_line(error)
    if isinstance(error, AttributeError) or "pa_call" in text:
        return EngineError(
            "this vLLM engine has no worker extension of pa_fast",
            "start it with worker_extension_cls=pa_fast.vllm.EXTENSION, or use pa_fast.vllm.load",
        )
    return EngineError(
        f"a call to vLLM's workers failed: {type(error).__name__}: {text}",
        "a worker may have died, and λ is not known: start the engine again",
    )
