"""The pair that an engine is to follow, as its driver reads it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from pa_kernels.reference import CHECKSUM_VERSION

from pa_fast.checkpoint.folder import check_companions, resolve
from pa_fast.checkpoint.pair import PairOptions, pair
from pa_fast.checkpoint.reader import Checkpoint
from pa_fast.checkpoint.safetensors import read_object
from pa_fast.checkpoint.vocabulary import untrained_rows
from pa_fast.engines import options
from pa_fast.engines.tokenizer import stop_tokens, tokenizer_of
from pa_fast.errors import EngineError, UsageError
from pa_fast.rounding import Rounding
from pa_fast.rules import LambdaRule, RuleLike
from pa_fast.stores import registry
from pa_fast.stores.store import Store


@dataclass(frozen=True)
class PairArguments:
    """A pair and the options by which it is bound, checked, with the folders found and paired. Make
    one with `PairArguments.of`.

    Attributes:
        config: instruct's config.json, by which the engine starts.
        notes: what a user should know of the pair.
        stop_tokens: ids that end a text for either side or the tokenizer.
        identity: values that must be equal for a sweep to be resumed.
        words: the tokenizer in the folder `tokenizer`, or None.
    """

    base: Path
    instruct: Path
    tokenizer: Path
    store: Store
    residency: str
    rounding: Rounding
    rule: LambdaRule | None
    allow_nonfinite: bool
    pairing: PairOptions
    config: Mapping[str, Any]
    notes: tuple[str, ...]
    stop_tokens: tuple[int, ...]
    identity: Mapping[str, Any]
    words: Any

    @classmethod
    def of(
        cls,
        base: str | Path,
        instruct: str | Path,
        *,
        store: str | Store = "dense",
        residency: str = "device",
        rounding: str | Rounding = "nearest",
        rule: RuleLike | None = None,
        tokenizer: str | Path | None = None,
        allow_nonfinite: bool = False,
        extra_rows: str = "instruct",
        one_sided: str | None = None,
        ignore_config: Iterable[str] = (),
        strip_prefix: str | Iterable[str] = (),
    ) -> PairArguments:
        """Return the arguments of `load`; pairs the folders by their headers.

        Raises:
            CheckpointError, PairError, DataError: the folders cannot be read or do not pair.
            UsageError: an option is not valid.
        """
        followed = None if rule is None else LambdaRule.of(rule)
        rounded, held = Rounding.of(rounding), registry.named(store)
        pairing = PairOptions.of(extra_rows, one_sided, ignore_config, strip_prefix)
        folders = resolve(base), resolve(instruct)
        with Checkpoint.open(folders[0]) as b, Checkpoint.open(folders[1]) as i:
            check_companions(i.folder)
            paired = pair(b, i, pairing)
            if followed is not None:
                followed.touched([name for name in paired.names if paired.is_lerped(name)])
            spoken = folders[1] if tokenizer is None else resolve(tokenizer)
            words = tokenizer_of(spoken)
            return cls(
                *folders,
                spoken,
                held,
                residency,
                rounded,
                followed,
                allow_nonfinite,
                pairing,
                i.config,
                (*paired.notes, *untrained_rows(b, i)),
                tuple(
                    stop_tokens(words, _speaker(b.folder, b.config), _speaker(i.folder, i.config))
                ),
                {
                    "checksum": CHECKSUM_VERSION,
                    **options.of_sides(paired.base, paired.instruct),
                    **options.of_tokenizer(words),
                    "store": held.describe(),
                    "rounding": str(rounded),
                    **({} if followed is None else {"rule": followed.document()}),
                },
                words,
            )

    def check_tokenizer(self, engine_args: Mapping[str, Any]) -> None:
        """Raise EngineError where there is no tokenizer and the engine is not told to do without:
        `skip_tokenizer_init`, as vLLM and SGLang call it."""
        if self.words is None and not engine_args.get("skip_tokenizer_init"):
            raise EngineError(
                f"{self.tokenizer} has no tokenizer files",
                "pass tokenizer= (--tokenizer) with a folder that has, or skip_tokenizer_init=True",
            )

    def for_workers(self) -> dict[str, Any]:
        """Return the argument of `WorkerWeights.bind`, of plain values."""
        return {
            "base": str(self.base.absolute()),
            "instruct": str(self.instruct.absolute()),
            "pairing": self.pairing.document(),
            "store": [self.store.name, dataclasses.asdict(self.store)],  # type: ignore[call-overload]
            "residency": self.residency,
            "rounding": str(self.rounding),
            "rule": None if self.rule is None else self.rule.document(),
            "allow_nonfinite": self.allow_nonfinite,
        }


def instruct_of(engine: str, instruct: str | Path | None) -> str | Path:
    """Return `instruct`, the folder that `engine` is started on.

    Raises:
        UsageError: there is none.
    """
    if instruct is None:
        raise UsageError(
            f"{engine} needs the instruct folder, whose configuration it starts with",
            "name INSTRUCT after BASE; a delta file cannot take its place here",
        )
    return instruct


def _speaker(folder: Path, config: Mapping[str, Any]) -> Any:
    """Return the configurations of a model that say where its texts end.

    Args:
        config: its config.json, for a class that transformers does not have.
    """
    from transformers import AutoConfig

    try:
        spoken = AutoConfig.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError):
        stop_ids = config.get("text_config", config).get("eos_token_id")
        spoken = SimpleNamespace(get_text_config=lambda: SimpleNamespace(eos_token_id=stop_ids))
    path = folder / "generation_config.json"
    generation = SimpleNamespace(**read_object(path)) if path.exists() else None
    return SimpleNamespace(config=spoken, generation_config=generation)
