"""Differences between two config.json files, and which of them change what the model computes.

Every key must be equal unless this module lists it as harmless. Files of different transformers
versions spell the same model differently (`rope_theta` beside `rope_scaling`, or inside
`rope_parameters`; defaults written out, or left out). So where the files differ, both are compared
as transformers' configuration class reads them. A key that no source file of the model's class
mentions is not read by the class.
"""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pa_fast.checkpoint.safetensors import quoted

ABSENT = "absent"
_HARMLESS = (
    # who wrote it
    (
        "_name_or_path _commit_hash transformers_version torch_dtype dtype auto_map unsloth_version"
        " unsloth_fixed model_name"
    ),
    # how it is run
    (
        "use_cache cache_implementation use_return_dict return_dict output_attentions"
        " output_hidden_states output_router_logits"
    ),
    (
        "attn_implementation _attn_implementation _attn_implementation_internal"
        " _attn_implementation_autoset torchscript"
    ),
    # training
    (
        "initializer_range initializer_cutoff_factor gradient_checkpointing router_aux_loss_coef"
        " router_z_loss_coef"
    ),
    (
        "attention_dropout attn_pdrop embd_pdrop resid_pdrop hidden_dropout hidden_dropout_prob"
        " classifier_dropout"
    ),
    "router_jitter_noise",
    # tokens and generation
    (
        "bos_token_id eos_token_id pad_token_id sep_token_id cls_token_id unk_token_id"
        " decoder_start_token_id tokenizer_class"
    ),
    (
        "max_length min_length do_sample temperature top_k top_p typical_p repetition_penalty"
        " num_beams num_return_sequences"
    ),
    # heads of other tasks
    "summary_type summary_use_proj summary_activation summary_proj_to_labels summary_first_dropout",
    (
        "id2label label2id num_labels problem_type finetuning_task task_specific_params"
        " chunk_size_feed_forward"
    ),
    # compared as the rows of the embedding, by shape
    "vocab_size",
)
# keys that cannot change the forward pass of an evaluation
HARMLESS = frozenset(" ".join(_HARMLESS).split())
# rope types that never look at max_position_embeddings
_LENGTH_FREE_ROPE = {
    "default",
    "linear",
    "llama3",
}
# the class writes one list entry per layer: a hostile count must not fill the memory
_MAX_EXPANDED_LAYERS = 4096


@dataclass(frozen=True)
class Difference:
    """One key that differs between two configurations.

    Attributes:
        key: nested keys are joined by dots.
        harmless: True if the difference cannot change a forward pass.
        ignored: True if it may change one, and the user accepts that.
        reason: why a key that this module does not list as harmless is accepted; empty for all
            others.
    """

    key: str
    base: Any
    instruct: Any
    harmless: bool
    ignored: bool = False
    reason: str = ""

    @property
    def is_accepted(self) -> bool:
        return self.harmless or self.ignored

    def __str__(self) -> str:
        return (
            f"{quoted(self.key)} is {quoted(str(self.base))} in base and"
            f" {quoted(str(self.instruct))} in instruct"
        )


def differences(
    base: Mapping[str, Any],
    instruct: Mapping[str, Any],
    beside: frozenset[str] = frozenset(),
    ignored: Iterable[str] = (),
) -> list[Difference]:
    """Return all differences of two configurations, sorted by key.

    Args:
        beside: keys that are harmless in this pair, because the caller handles their difference.
        ignored: keys, with all that is nested below them, whose difference the user accepts.

    Cost: microseconds if only harmless and ignored keys differ; otherwise transformers is imported
    to tell spelling from meaning. No remote code is run.
    """
    differing = [_accepted(one, ignored) for one in _compare(base, instruct, beside)]
    if all(difference.is_accepted for difference in differing):
        return differing
    base_expanded, instruct_expanded = _expanded(base), _expanded(instruct)
    if (
        base_expanded is None
        or instruct_expanded is None
        or base.get("model_type") != instruct.get("model_type")
    ):
        return differing
    expanded = [
        _accepted(one, ignored) for one in _compare(base_expanded, instruct_expanded, beside)
    ]
    # after expansion a missing key is one that the class does not know; null or false then says
    # "not used"
    real = [
        d
        for d in expanded
        if not d.harmless and {_is_empty(d.base), _is_empty(d.instruct)} != {True}
    ]
    keys = {d.key for d in real}
    same_meaning = [_harmless(d) for d in differing if d.key not in keys]
    unread = _unread([d.key for d in real], base_expanded, instruct_expanded)
    reason = f"no class of transformers for {quoted(str(base.get('model_type')))} reads it"
    real = [_harmless(d, reason) if d.key in unread else d for d in real]
    return sorted(same_meaning + real, key=lambda difference: difference.key)


def model_class_name(*configs: Mapping[str, Any]) -> str | None:
    """Return the class that the first of `configs` with `architectures` names; None if none has
    it."""
    for config in configs:
        named = config.get("architectures")
        if isinstance(named, list) and named and isinstance(named[0], str):
            return named[0]
    return None


def is_tied_in_config(config: Mapping[str, Any]) -> bool | None:
    """Return `tie_word_embeddings` of the model or of the text model nested in it; None if neither
    states it, or they disagree."""
    text = config.get("text_config")
    parts = (text if isinstance(text, Mapping) else {}, config)
    stated = {
        part["tie_word_embeddings"]
        for part in parts
        if isinstance(part.get("tie_word_embeddings"), bool)
    }
    return stated.pop() if len(stated) == 1 else None


def is_tied(config: Mapping[str, Any]) -> bool | None:
    """Return whether the head is tied: as the configuration states, else as the model's class in
    transformers does; None if neither tells."""
    stated = is_tied_in_config(config)
    return stated if stated is not None else is_tied_in_config(_expanded(config) or {})


def _compare(
    base: Mapping[str, Any], instruct: Mapping[str, Any], beside: frozenset[str]
) -> list[Difference]:
    base_flat, instruct_flat = _flat(base), _flat(instruct)
    ignored = set(beside)
    if _rope_types(base_flat) | _rope_types(instruct_flat) <= _LENGTH_FREE_ROPE:
        ignored.add("max_position_embeddings")
    if (
        base_flat.get("use_sliding_window") is False
        and instruct_flat.get("use_sliding_window") is False
    ):
        ignored |= {"sliding_window", "max_window_layers"}
    differing = []
    for key in sorted(base_flat.keys() | instruct_flat.keys()):
        b, i = base_flat.get(key, ABSENT), instruct_flat.get(key, ABSENT)
        if b != i:
            harmless = bool((HARMLESS | ignored) & set(key.split(".")))
            differing.append(Difference(key, b, i, harmless))
            if key == "architectures" and _is_absent(b) != _is_absent(i):
                differing[-1] = _harmless(
                    differing[-1], "absent on one side: the class that the other names is taken"
                )
    return differing


def _accepted(difference: Difference, ignored: Iterable[str]) -> Difference:
    """Return `difference`, marked as ignored if it is not harmless and the user accepts it."""
    if difference.harmless or not any(
        f"{difference.key}.".startswith(f"{key}.") for key in ignored
    ):
        return difference
    return replace(difference, ignored=True, reason="ignored on request (--ignore-config)")


def _harmless(difference: Difference, reason: str = "") -> Difference:
    """Return `difference`, marked as harmless; with `reason`, or the one that it has unless that
    is the user's request."""
    reason = reason or ("" if difference.ignored else difference.reason)
    return replace(difference, harmless=True, ignored=False, reason=reason)


def _unread(keys: list[str], *configs: Mapping[str, Any]) -> set[str]:
    """Return those of `keys` that no source file of the model that `configs` describe mentions.

    A key inside a plain mapping counts as read if the key of the mapping is, because the mapping
    may be passed on whole.
    """
    if not keys or any(
        model_class_name(config) and not _is_own_class(config) for config in configs
    ):
        return set()  # code that is not transformers' own may read any key
    text = _source_text(
        tuple(sorted({kind for config in configs for kind in _model_types(config)}))
    )
    if text is None:
        return set()
    unread = set()
    for key in keys:
        heads = {head for config in configs for head in _heads(config, key)}
        if heads and not any(re.search(rf"(?<!\w){re.escape(head)}(?!\w)", text) for head in heads):
            unread.add(key)
    return unread


def _heads(config: Mapping[str, Any], key: str) -> Iterator[str]:
    """Yield the key of `config`, or of a configuration nested in it, by which the flattened `key`
    is read."""
    for name, value in config.items():
        if key == name or key.startswith(f"{name}."):
            if isinstance(value, Mapping) and "model_type" in value and key != name:
                yield from _heads(value, key[len(name) + 1 :])
            else:
                yield name


def _model_types(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield the `model_type` of a configuration and of those nested in it."""
    if isinstance(config.get("model_type"), str):
        yield config["model_type"]
    for value in config.values():
        if isinstance(value, Mapping):
            yield from _model_types(value)


def _is_own_class(config: Mapping[str, Any]) -> bool:
    """Return whether transformers itself has the class that `config` names."""
    import transformers

    return hasattr(transformers, str(model_class_name(config)))


@functools.lru_cache(maxsize=8)
def _source_text(model_types: tuple[str, ...]) -> str | None:
    """Return the source files of transformers that a model of `model_types` may run, joined; None
    if transformers does not know one of the types."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if any(kind not in CONFIG_MAPPING for kind in model_types):
        return None
    root = Path(transformers.__file__).parent
    packages = [CONFIG_MAPPING[kind].__module__.split(".")[1:-1] for kind in model_types]
    folders = [root, root / "integrations", *(root.joinpath(*package) for package in packages)]
    files = [file for folder in folders for file in sorted(folder.glob("*.py"))]
    return "\n".join(file.read_text(encoding="utf-8", errors="replace") for file in files)


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + str(key)] = value
    return flat


def _rope_types(flat: Mapping[str, Any]) -> set[str]:
    """Return the rope types that a flattened configuration names, under any of the spellings in
    use."""
    types = {str(value) for key, value in flat.items() if key.split(".")[-1] == "rope_type"}
    types |= {
        str(value)
        for key, value in flat.items()
        if key.endswith(("rope_scaling.type", "rope_parameters.type"))
    }
    return types


def _is_absent(value: Any) -> bool:
    return value in (None, ABSENT, [])


def _is_empty(value: Any) -> bool:
    return value is None or value is False or value == ABSENT


def _expanded(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the configuration as transformers' class reads it, defaults filled in; None if there
    is no class or it refuses."""
    layers = config.get("num_hidden_layers", 0)
    if not isinstance(layers, int) or layers > _MAX_EXPANDED_LAYERS:
        return None
    try:
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        return CONFIG_MAPPING[config["model_type"]].from_dict(copy.deepcopy(dict(config))).to_dict()
    except Exception:
        # an unknown or malformed configuration is compared as it is written, which is stricter
        return None
