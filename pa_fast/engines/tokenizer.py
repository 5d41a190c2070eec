"""The tokenizer of a pair, and the tokens that end a text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pa_fast.checkpoint.folder import check_companions
from pa_fast.engines import own_code
from pa_fast.errors import EngineError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def tokenizer_of(folder: Path) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer in `folder`, or None where there is none."""
    names = (
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
        "vocab.json",
        "vocab.txt",
        "spiece.model",
    )
    if not any((folder / name).exists() for name in names):
        return None
    check_companions(folder)
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # whatever a tokenizer file can break
        for file, auto_class in (
            ("tokenizer_config.json", "AutoTokenizer"),
            ("config.json", "AutoConfig"),
        ):
            refused = own_code.refused(folder, file, auto_class, error)
            if refused is not None:
                raise refused from error
        reason = first_line(error)
        raise EngineError(
            f"transformers cannot load the tokenizer in {folder}: {reason}",
            "check tokenizer.json there",
        ) from error
    # Its warning of long texts is noise: evaluators cut these into windows, and the engine refuses
    # what is too long for the model.
    tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
    return tokenizer


def stop_tokens(tokenizer: Any, *models: PreTrainedModel) -> list[int]:
    """Return every id that ends a text for one of `models`, by its own configurations, or for
    `tokenizer`."""
    speakers = [
        tokenizer,
        *(
            c
            for m in models
            for c in (m.config.get_text_config(), getattr(m, "generation_config", None))
        ),
    ]
    stop_ids = [getattr(s, "eos_token_id", None) for s in speakers]
    return sorted(
        {
            i
            for ids in stop_ids
            if ids is not None
            for i in (ids if isinstance(ids, list) else [ids])
        }
    )


def spelling(tokenizer: Any) -> str:
    """Return everything that decides how `tokenizer` splits text, as one text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return str(backend.to_str()) if backend is not None else repr(tokenizer)
