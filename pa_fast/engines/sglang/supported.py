"""What SGLang may be started with: everything that changes how weights are held, or keeps answers
of the last λ, and has not been proven, is refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pa_fast.errors import EngineError

CHECKED = "0.5.23"
"""The release of SGLang whose source this was checked against."""

_OFF = (None, False, 0, "", "null", "none", "off")
_ONE = (*_OFF, 1)
_REFUSED: tuple[tuple[str, tuple[str, ...], tuple[Any, ...]], ...] = (
    ("code of the checkpoint", ("trust_remote_code",), _OFF),
    ("another task than generation", ("is_embedding", "encoder_only", "dllm_algorithm"), _OFF),
    ("quantised weights", ("quantization", "modelopt_quant", "quantize_and_serve"), _OFF),
    ("quantised weights", ("rl_quant_profile",), _OFF),
    ("a quantised KV cache", ("kv_cache_dtype",), (*_OFF, "auto", "bfloat16", "bf16", "float16")),
    ("LoRA", ("enable_lora", "lora_paths"), (*_OFF, [], {})),
    ("speculative decoding", ("speculative_algorithm",), _OFF),
    ("pipeline parallelism", ("pp_size",), _ONE),
    ("data parallelism", ("dp_size", "attn_dp_size", "moe_dp_size", "dwdp_size"), _ONE),
    ("data parallelism", ("enable_dp_attention",), _OFF),
    ("expert parallelism", ("ep_size",), _ONE),
    ("expert parallelism", ("elastic_ep_backend", "enable_eplb"), _OFF),
    ("paged experts", ("enable_paged_experts", "kt_weight_path"), _OFF),
    ("context parallelism", ("attn_cp_size", "dcp_size"), _ONE),
    ("ranks on several hosts", ("nnodes",), _ONE),
    ("ranks on Ray", ("use_ray",), _OFF),
    ("prefill and decode apart", ("disaggregation_mode",), _OFF),
    ("a cache beyond the GPU", ("enable_hierarchical_cache", "enable_lmcache"), _OFF),
    ("a cache beyond the GPU", ("enable_flexkv", "enable_unified_cache_external_linker"), _OFF),
    ("a cache of its own", ("radix_cache_backend",), _OFF),
    ("offloaded weights", ("cpu_offload_gb", "ple_offload_embedding"), _OFF),
    ("offloaded weights", ("offload_group_size",), (*_OFF, -1)),
    ("shared weights", ("weight_cache_mode",), _OFF),
    ("released memory", ("enable_memory_saver",), _OFF),
    ("AMD monokernels", ("enable_amd_monokernel",), _OFF),
    ("logits processors", ("enable_custom_logit_processor", "enable_watermark"), _OFF),
    ("forward hooks", ("forward_hooks",), (*_OFF, [])),
    ("several tokenizer processes", ("tokenizer_worker_num",), _ONE),
)
"""What is refused, the arguments of `sglang.Engine` that ask for it, and values that do not."""

_IN_CONFIG = (
    ("multi-head latent attention", ("kv_lora_rank",)),
    ("mixtures of experts", ("num_experts", "num_local_experts", "n_routed_experts")),
)
"""What is refused, and the keys of config.json that say so."""


def check(arguments: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Check arguments of `sglang.Engine`, given or resolved, and instruct's config.json.

    Raises:
        EngineError: they ask for something that is not supported.
    """
    for what, names, harmless in _REFUSED:
        for name in names:
            if arguments.get(name) not in harmless:
                _refuse(what, f"{name}={arguments[name]}")
    for what, keys in _IN_CONFIG:
        for part in (config, config.get("text_config") or {}):
            for key in keys:
                if part.get(key) not in _ONE:
                    _refuse(what, f"{key} in config.json")


def _refuse(what: str, value: str) -> None:
    raise EngineError(
        f"SGLang with {what} ({value[:80]}) is not supported: it has not been shown that λ reaches"
        " every weight there, and that answers are what they would be",
        "start SGLang without it, or sweep with the transformers engine",
    )
