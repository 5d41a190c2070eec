"""Code that a checkpoint brings along, which is never run: the errors where a model or tokenizer
needs it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pa_fast.checkpoint.safetensors import quoted, read_object
from pa_fast.errors import CheckpointError, EngineError, PaFastError

_KERNELS = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")
_HINT = (
    "code in a checkpoint is never run: upgrade transformers if it has a class for this model by"
    " now, or convert the checkpoint with code that you have read"
)


def refused(folder: Path, file: str, auto_class: str, error: Exception) -> PaFastError | None:
    """Return the error to raise if transformers failed with `error` because `auto_class` needs the
    checkpoint's code; else None.

    Args:
        file: the configuration in `folder` that may map `auto_class` to a module of its own.
    """
    named = _named(folder, file).get(auto_class)
    if named is None or "trust_remote_code" not in str(error):
        return None
    return EngineError(
        f"{folder / file}: `auto_map` names code of its own, {quoted(named)} as {auto_class}, which"
        " is not run",
        _HINT,
    )


def model_class(folder: Path, config: dict[str, Any]) -> Any:
    """Return the transformers class of the model in `folder`: the one that `architectures` names,
    an Auto class where it names none.

    Raises:
        EngineError: transformers has no model of that name; attention kernels would be fetched from
            the hub.
    """
    import transformers

    for key, kernels in _kernels(config):
        raise EngineError(
            f"{folder / 'config.json'}: {quoted(key)} asks for kernels of the hub,"
            f" {quoted(kernels)}, which are not run",
            f"remove {quoted(key)} from that file",
        )
    names = config.get("architectures") or []
    if not names:
        return transformers.AutoModelForCausalLM
    name = names[0] if isinstance(names, list) else names
    cls = getattr(transformers, name, None) if isinstance(name, str) else None
    if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel):
        return cls
    message = (
        f"transformers {transformers.__version__} has no model class {quoted(str(name))}"
        f" (config.json of {folder})"
    )
    own = _named(folder, "config.json")
    if own:
        message += (
            f"; `auto_map` there names code of its own, such as {quoted(next(iter(own.values())))},"
            " which is not run"
        )
    raise EngineError(
        message,
        _HINT if own else "upgrade transformers for new architectures, or correct `architectures`",
    )


def _named(folder: Path, file: str) -> dict[str, str]:
    """Return auto class → module and class of the checkpoint's own, as `file` names them; the last
    of several."""
    try:
        auto_map = read_object(folder / file).get("auto_map")
    except CheckpointError:
        return {}
    if isinstance(auto_map, list):  # the older form, of tokenizers alone
        auto_map = {"AutoTokenizer": auto_map}
    if not isinstance(auto_map, dict):
        return {}
    return {
        key: (
            str(next((one for one in reversed(value) if one), ""))
            if isinstance(value, list)
            else str(value)
        )
        for key, value in auto_map.items()
    }


def _kernels(config: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield each key that names kernels of a hub repository, and the name."""
    for key, value in config.items():
        if key in _KERNELS:
            for name in value.values() if isinstance(value, dict) else (value,):
                if "/" in str(name):
                    yield key, str(name)
        elif isinstance(value, dict):
            yield from _kernels(value)
