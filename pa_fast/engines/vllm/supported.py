"""What vLLM may be started with: everything that changes how weights are held, and has not been
proven, is refused by name."""

from __future__ import annotations

from typing import Any

from pa_fast.errors import EngineError

TESTED = "0.32.0"
"""The release of vLLM that the tests ran with."""


def check(config: Any) -> None:
    """Check a `vllm.config.VllmConfig`.

    Raises:
        EngineError: it asks for something that is not supported.
    """
    model, parallel = config.model_config, config.parallel_config
    refused = (
        ("code of the checkpoint (trust_remote_code)", getattr(model, "trust_remote_code", False)),
        ("another task than generation", _is_other_task(model)),
        ("logits processors", getattr(model, "logits_processors", None)),
        ("quantised weights", getattr(model, "quantization", None)),
        ("LoRA", config.lora_config),
        ("speculative decoding", config.speculative_config),
        ("multi-head latent attention", getattr(model, "use_mla", False)),
        ("pipeline parallelism", parallel.pipeline_parallel_size > 1),
        ("expert parallelism", getattr(parallel, "enable_expert_parallel", False)),
        ("data parallelism", getattr(parallel, "data_parallel_size", 1) > 1),
        ("a KV connector", getattr(config, "kv_transfer_config", None)),
        ("a quantised KV cache", _is_quantised(config.cache_config.cache_dtype)),
        ("sleep mode", getattr(model, "enable_sleep_mode", False)),
        ("offloaded weights", _is_offloaded(config)),
    )
    for what, value in refused:
        if value:
            named = getattr(value, "method", value)
            detail = f" ({named})" if isinstance(named, str) else ""
            raise EngineError(
                f"vLLM with {what}{detail} is not supported: it has not been shown that λ reaches"
                " every weight there, and that answers are what they would be",
                "start vLLM without it, or sweep with the transformers engine",
            )
    mode = str(getattr(model, "logprobs_mode", "raw_logprobs")).rpartition(".")[2].lower()
    if mode != "raw_logprobs":
        raise EngineError(
            f"vLLM with logprobs_mode={mode}: log-likelihoods are read from raw_logprobs",
            "leave logprobs_mode out",
        )


def _is_other_task(model: Any) -> str | None:
    runner = getattr(model, "runner_type", "generate")
    return None if runner == "generate" else str(runner)


def _is_quantised(cache_dtype: Any) -> bool:
    return str(cache_dtype) not in ("auto", "bfloat16", "float16", "float32")


def _is_offloaded(config: Any) -> bool:
    offload = getattr(config, "offload_config", None)
    uva = getattr(offload, "uva", None)
    prefetch = getattr(offload, "prefetch", None)
    return bool(
        getattr(config.cache_config, "cpu_offload_gb", 0)
        or getattr(uva, "cpu_offload_gb", 0)
        or getattr(prefetch, "offload_group_size", 0)
    )
