"""vLLM's loader `pa_fast`: the pair is bound inside `load_model`, before vLLM measures how much
memory is left for key-value blocks."""

from __future__ import annotations

import dataclasses
from typing import Any

FORMAT = "pa_fast"
"""The `load_format` of vLLM, and the key of its `additional_config` that holds the arguments of
`WorkerWeights.bind`."""


def register() -> None:
    """Make `load_format="pa_fast"` known in this process; does nothing at a second call."""
    from vllm.config.load import LoadConfig
    from vllm.model_executor.model_loader import get_model_loader

    try:
        get_model_loader(LoadConfig(load_format=FORMAT))
    except ValueError:
        _register()


def _register() -> None:
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    from pa_fast.engines.served.worker_weights import weights_of
    from pa_fast.engines.vllm.stack import VllmStack

    @register_model_loader(FORMAT)
    class PairLoader(DefaultModelLoader):
        """Loads the instruct side as vLLM does, then binds the pair."""

        def __init__(self, load_config: Any):
            # safetensors alone: no pickles
            super().__init__(dataclasses.replace(load_config, load_format="safetensors"))

        def load_model(self, vllm_config: Any, model_config: Any, prefix: str = "") -> Any:
            model = super().load_model(
                vllm_config=vllm_config, model_config=model_config, prefix=prefix
            )
            pair_arguments = (vllm_config.additional_config or {}).get(FORMAT)
            if pair_arguments is not None:
                weights_of(model, VllmStack(vllm_config)).bind_at_load(model, pair_arguments)
            return model
