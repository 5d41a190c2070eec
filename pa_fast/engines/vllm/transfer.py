"""vLLM's weight-transfer backend `pa_fast`: λ by the public `start_weight_update`,
`update_weights` and `finish_weight_update`, for people who drive vLLM by these.

    llm = LLM(instruct, worker_extension_cls=pa_fast.vllm.EXTENSION,
              weight_transfer_config={"backend": "pa_fast"})
    llm.init_weight_transfer_engine({"init_info": {"base": base, "instruct": instruct}})
    llm.start_weight_update()
    llm.update_weights({"update_info": {"lam": "0.6"}})
    llm.finish_weight_update(weight_version=pa_fast.vllm.weight_version("0.6"))
    llm.reset_prefix_cache()
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import Any

BACKEND = "pa_fast"


def register() -> None:
    """Make the backend known in this process, where this release of vLLM has such; does nothing at
    a second call."""
    try:
        from vllm.distributed.weight_transfer import base
        from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
    except ImportError:  # an older release, which has the other ways
        return
    with contextlib.suppress(ValueError):  # it is known already
        WeightTransferEngineFactory.register_engine(BACKEND, _engine(base))


def _engine(base: Any) -> type:
    from pa_fast.base import Lambda
    from pa_fast.engines.served.worker_weights import WorkerWeights, weights_of
    from pa_fast.engines.vllm.stack import VllmStack

    @dataclass
    class PairInfo(base.WeightTransferInitInfo):
        """The arguments of `WorkerWeights.bind`."""

        base: str
        instruct: str
        options: dict[str, Any] = field(default_factory=dict)

    @dataclass
    class LambdaInfo(base.WeightTransferUpdateInfo):
        """λ, and the rows of a rule at that λ or None."""

        lam: float | str
        rows: Any = None

    class LambdaTransfer(base.WeightTransferEngine):
        """No weight is sent: an update is λ, and each worker writes its own parameters."""

        init_info_cls, update_info_cls = PairInfo, LambdaInfo
        supports_draft_weight_update = False

        def init_transfer_engine(self, init_info: Any) -> None:
            pair_arguments = {
                "base": init_info.base,
                "instruct": init_info.instruct,
                **init_info.options,
            }
            self._weights().bind(self.model, pair_arguments)

        def start_weight_update(self) -> None:
            pass

        def receive_weights(self, update_info: Any) -> None:
            key = Lambda(update_info.lam).key
            self._weights().set_lambda(self.model, key, update_info.rows)

        def finish_weight_update(self) -> None:
            pass

        def shutdown(self) -> None:
            pass

        def _weights(self) -> WorkerWeights:
            return weights_of(self.model, VllmStack(self.vllm_config))

    for one in (PairInfo, LambdaInfo):
        one.__qualname__ = one.__name__  # in vLLM's message on fields that are wrong
    return LambdaTransfer
