"""vLLM in a worker, as far as its weights are concerned."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pa_fast.engines.served.layout import NamedTensors
from pa_fast.engines.vllm import cpu, supported
from pa_fast.errors import EngineError

if TYPE_CHECKING:
    import torch

EXTENSION = "pa_fast.engines.vllm.worker.Extension"
"""The `worker_extension_cls` of vLLM."""


class VllmStack:
    """Implements `Stack` with the `VllmConfig` of a worker."""

    name: ClassVar[str] = "vLLM"
    keeps_weights: ClassVar[str] = (
        f"start it with worker_extension_cls={EXTENSION!r}, which keeps them"
    )

    def __init__(self, config: Any):
        self._config = config

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self._config.model_config.dtype
        return dtype

    @property
    def world(self) -> int:
        return int(self._config.parallel_config.tensor_parallel_size)

    @property
    def rank(self) -> int:
        from vllm.distributed import get_tensor_model_parallel_rank

        return int(get_tensor_model_parallel_rank())

    def check(self, model: Any) -> None:
        """See `supported.check`."""
        supported.check(self._config)

    def reload(self, model: Any, tensors: NamedTensors) -> set[str]:
        """Load `tensors` into the parameters of `model` as vLLM loads a checkpoint, in place, its
        post-processing included; return the names of the parameters that were loaded.

        Raises:
            EngineError: this model does not say which parameters it loaded.
        Source: the three steps of `vllm.model_executor.model_loader.reload.reload_weights`, which
            keeps the names to itself.
        """
        import torch
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.reload import (
            finalize_layerwise_reload,
            initialize_layerwise_reload,
        )

        with set_current_vllm_config(self._config), torch.no_grad():
            initialize_layerwise_reload(model)
            loaded = model.load_weights(tensors)
            finalize_layerwise_reload(model, self._config.model_config)
        if loaded is None:
            raise EngineError(
                f"vLLM's {type(model).__name__} does not say which parameters it loads",
                "sweep this architecture with the transformers engine",
            )
        return set(loaded)

    def after_write(self, model: Any) -> None:
        """Pack weights again, where a CPU multiplies packed ones."""
        cpu.pack(model)
