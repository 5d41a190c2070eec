"""Ranks and scales of an adapter, layer by layer, from `adapter_config.json`.

Other options of a configuration change the function of the factors, so every unknown option is
refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pa_fast.checkpoint.safetensors import quoted, read_object
from pa_fast.errors import CheckpointError

_LIMIT_BYTES = 10_000_000
_MOST_PATTERNS = 10_000
_HARMLESS = {
    "peft_type",
    "peft_version",
    "task_type",
    "auto_mapping",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "r",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "init_lora_weights",
    "bias",
    "lora_dropout",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "ensure_weight_tying",
    "megatron_core",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "qalora_group_size",
}
_INITIAL = (True, False, None, "gaussian", "eva", "orthogonal")
"""Initialisations that leave the base as it is; `pissa` and others move a part of it into the
factors."""

_ANOTHER = (
    "merge the adapter with peft (merge_and_unload) and give the merged model as the instruct side"
)


@dataclass(frozen=True)
class Scaling:
    """Ranks and scales: W = B + s·BA for each layer, with the rank that it must have, and s."""

    rank: int
    alpha: float
    ranks: tuple[tuple[re.Pattern[str], int], ...]
    alphas: tuple[tuple[re.Pattern[str], float], ...]
    stabilised: bool

    @classmethod
    def read(cls, path: Path) -> Scaling:
        """Read the file `path`, if it describes a plain LoRA.

        Raises:
            CheckpointError: it is not the configuration of one; naming the option and its value.
        """
        config = read_object(path, _LIMIT_BYTES)
        kind = config.get("peft_type")
        if kind != "LORA":
            raise CheckpointError(
                f"{path}: `peft_type` is {quoted(str(kind))}, expected LORA", _ANOTHER
            )
        for key, value in config.items():
            if key not in _HARMLESS and value:
                raise CheckpointError(
                    f"{path}: {quoted(key)} is {quoted(str(value))}: this is no plain LoRA",
                    _ANOTHER,
                )
        if config.get("bias", "none") != "none":
            raise CheckpointError(
                f"{path}: `bias` is {quoted(str(config['bias']))}, expected none", _ANOTHER
            )
        begin = config.get("init_lora_weights", True)
        if not isinstance(begin, (bool, str, type(None))) or begin not in _INITIAL:
            raise CheckpointError(
                f"{path}: `init_lora_weights` is {quoted(str(begin))}, which changes the base",
                _ANOTHER,
            )
        return cls(
            _rank(path, "r", config.get("r", 8)),
            _alpha(path, "lora_alpha", config.get("lora_alpha", 8)),
            tuple(
                (key, _rank(path, key.pattern, value))
                for key, value in _patterns(path, config, "rank_pattern")
            ),
            tuple(
                (key, _alpha(path, key.pattern, value))
                for key, value in _patterns(path, config, "alpha_pattern")
            ),
            bool(config.get("use_rslora")),
        )

    def of(self, layer: str) -> tuple[int, float]:
        """Return rank and scale of the layer of that path. Of several patterns that match, the
        first one counts."""
        rank = next((value for key, value in self.ranks if key.match(layer)), self.rank)
        alpha = next((value for key, value in self.alphas if key.match(layer)), self.alpha)
        return rank, alpha / (math.sqrt(rank) if self.stabilised else rank)


def _patterns(
    path: Path, config: Mapping[str, Any], option: str
) -> list[tuple[re.Pattern[str], Any]]:
    patterns = config.get(option) or {}
    if not isinstance(patterns, dict) or len(patterns) > _MOST_PATTERNS:
        expected = f"an object of at most {_MOST_PATTERNS} patterns"
        raise CheckpointError(
            f"{path}: `{option}` is {quoted(str(patterns))}, expected {expected}", _ANOTHER
        )
    compiled = []
    for key, value in patterns.items():
        # a repeated group, or many repetitions or choices, can take for ever to fail
        if len(key) > 300 or re.search(r"\)[*+?{]", key) or len(re.findall(r"[*+?{(]", key)) > 4:
            raise CheckpointError(
                f"{path}: `{option}` has the pattern {quoted(key)}, expected a simpler one",
                _ANOTHER,
            )
        try:
            compiled.append((re.compile(rf"(.*\.)?({key})$"), value))
        except (re.error, OverflowError, RecursionError) as error:
            raise CheckpointError(
                f"{path}: `{option}` has the pattern {quoted(key)}: {error}", _ANOTHER
            ) from None
    return compiled


def _rank(path: Path, key: str, value: Any) -> int:
    if type(value) is not int or not 0 < value < 2**31:
        raise CheckpointError(
            f"{path}: rank {quoted(key)} is {quoted(str(value))}, expected a positive number",
            _ANOTHER,
        )
    return value


def _alpha(path: Path, key: str, value: Any) -> float:
    # as an fp32 number, which is what it scales
    if type(value) not in (int, float) or not abs(value) < 3e38:
        raise CheckpointError(
            f"{path}: alpha {quoted(key)} is {quoted(str(value))}, expected a finite number",
            _ANOTHER,
        )
    return float(value)
