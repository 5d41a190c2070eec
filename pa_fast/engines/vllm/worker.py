"""What vLLM's worker class gets. Import it in vLLM's workers alone, before the model is loaded: it
registers the loader and the weight-transfer engine, and keeps weights that a CPU would drop.

vLLM imports the module of `worker_extension_cls` in every worker, and mixes the class into its own.
"""

from __future__ import annotations

from typing import Any

from pa_fast.engines.served.worker_weights import answer
from pa_fast.engines.vllm import cpu, loader, transfer
from pa_fast.engines.vllm.stack import VllmStack

loader.register()
transfer.register()
cpu.keep_weights()


class Extension:
    """One method, whose name vLLM has no other use for."""

    def pa_call(self, method: str, *arguments: Any) -> dict[str, Any]:
        """Call `method` of this worker's `WorkerWeights`; see `answer`. Between processes vLLM
        passes on no class of an exception."""
        worker: Any = self
        model = worker.model_runner.get_model()
        return answer(model, VllmStack(worker.vllm_config), method, arguments)
