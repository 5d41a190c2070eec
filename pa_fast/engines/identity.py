"""What makes a loaded pair the same one again: everything that the scores of a sweep follow
from."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from pa_fast.checkpoint.config import HARMLESS
from pa_fast.checkpoint.reader import Checkpoint
from pa_fast.engines.asked import Asked
from pa_fast.engines.tokenizer import spelling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def identity(
    asked: Asked,
    base: Checkpoint,
    instruct: Checkpoint,
    store: str,
    tokenizer: PreTrainedTokenizerBase | None,
) -> dict[str, Any]:
    """Names and values that must be equal for a sweep to go on.

    Args:
        store: how the delta is held in the end.
    """
    return {
        "engine": "transformers",
        "base": base.quick_fingerprint(),
        "instruct": (
            instruct.quick_fingerprint()
            if asked.about is None
            else f"delta {asked.about.fingerprint()}"
        ),
        "base_config": _configuration(base),
        "instruct_config": _configuration(instruct),
        "store": store,
        "rounding": str(asked.rounding),
        **({} if asked.rule is None else {"rule": asked.rule.document()}),
        "dtype": asked.dtype,
        "tokenizer": _digest(spelling(tokenizer)),
        "chat_template": _digest(
            json.dumps(getattr(tokenizer, "chat_template", None), sort_keys=True)
        ),
    }


def _configuration(checkpoint: Checkpoint) -> str:
    """Digest of what config.json says about the function that the model computes."""
    return _digest(
        json.dumps(
            {k: v for k, v in checkpoint.config.items() if k not in HARMLESS}, sort_keys=True
        )
    )


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
