"""Random pairs of several architectures, small enough for a CPU: `made(folder, name)`."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

ROOT = pathlib.Path(__file__).parents[2]
DEMO = ROOT / "examples" / "demo" / "pair"
COMMON: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.08,
}


def _models() -> dict[str, Callable[..., Any]]:
    import transformers as t

    def of(kind: str, **own: Any) -> Callable[..., Any]:
        config, model = getattr(t, f"{kind}Config"), getattr(t, f"{kind}ForCausalLM")
        return lambda **given: model(config(**{**COMMON, **own, **given}))

    return {
        "llama": of("Llama", head_dim=64, tie_word_embeddings=False),
        "llama-heads": of(
            "Llama",
            hidden_size=256,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            tie_word_embeddings=False,
        ),
        "tied": of("Llama", head_dim=64, tie_word_embeddings=True),
        "qwen2": of("Qwen2", tie_word_embeddings=False),
        "gemma2": of("Gemma2", head_dim=64, query_pre_attn_scalar=64, sliding_window=64),
        "phi3": of("Phi3", tie_word_embeddings=False),
        "mixtral": of(
            "Mixtral", num_local_experts=4, num_experts_per_tok=2, tie_word_embeddings=False
        ),
        "deepseek": of(
            "DeepseekV2",
            num_key_value_heads=2,
            kv_lora_rank=32,
            q_lora_rank=None,
            qk_nope_head_dim=32,
            qk_rope_head_dim=16,
            v_head_dim=32,
            first_k_dense_replace=2,
            moe_intermediate_size=64,
        ),
    }


def made(
    folder: pathlib.Path, name: str, dtype: str = "bfloat16", **config: Any
) -> tuple[str, str]:
    """Return the folders of the pair `name`, made if they are not there; `demo` is the shipped
    one."""
    if name == "demo":
        return str(DEMO / "base"), str(DEMO / "instruct")
    import torch

    where = folder / "-".join([name, dtype, *(f"{k}={v}" for k, v in sorted(config.items()))])
    sides = str(where / "base"), str(where / "instruct")
    if where.exists():
        return sides
    torch.manual_seed(1)
    model = _models()[name](**config).to(getattr(torch, dtype))
    words = tokenizer()
    for side in sides:
        with torch.no_grad():
            for own in model.parameters():
                scale = 0.1 if own.ndim == 1 else 0.03
                own.copy_((own.float() + scale * torch.randn(own.shape)).to(own.dtype))
        model.save_pretrained(side)
        words.save_pretrained(side)
    return sides


def tokenizer() -> Any:
    """A byte-level tokenizer of 512 tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    text = [(ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "LICENSE")]
    words.train_from_iterator(
        text,
        trainers.BpeTrainer(
            vocab_size=512,
            special_tokens=["<pad>", "<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
