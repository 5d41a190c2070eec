"""What vLLM's worker class gets. Import it in vLLM's workers alone, before the model is loaded: it
registers the loader and the weight-transfer engine, and keeps weights that a CPU would drop.

vLLM imports the module of `worker_extension_cls` in every worker, and mixes the class into its own.
"""

from __future__ import annotations

from typing import Any

from pa_fast.engines.vllm import cpu, loader, transfer
from pa_fast.engines.vllm.worker_weights import weights_of
from pa_fast.errors import PaFastError

loader.register()
transfer.register()
cpu.keep_weights()


class Extension:
    """One method, whose name vLLM has no other use for."""

    def pa_call(self, method: str, *arguments: Any) -> dict[str, Any]:
        """Call `method` of this worker's `WorkerWeights`.

        Returns:
            `value`, or `error`: class, message and hint of a PaFastError. Between processes vLLM
            passes on no class of an exception.
        """
        worker: Any = self
        try:
            model = worker.model_runner.get_model()
            weights = weights_of(model, worker.vllm_config)
            return {"value": getattr(weights, method)(model, *arguments)}
        except PaFastError as error:
            return {"error": [type(error).__name__, error.message, error.hint]}
