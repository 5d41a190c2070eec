"""What a caller decides about pairing two checkpoints, beyond what the files say."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pa_fast.errors import UsageError

EXTRA_ROWS = ("instruct", "refuse")
ONE_SIDED = ("keep", "drop", "refuse")


@dataclass(frozen=True)
class PairOptions:
    """Options of every verb that pairs.

    Attributes:
        extra_rows: vocabulary rows that one side alone has are kept as they are (`instruct`) or not
            paired (`refuse`).
        one_sided: tensors that one side alone stores and that its model does not use, such as
            `mtp.*` or rotary tables, are kept as they are at every λ (`keep`), left out (`drop`) or
            not paired (`refuse`). None: those that the model class is known to ignore are kept,
            others refused.
        ignore_config: keys of config.json whose difference is accepted, with all that is nested
            below them.
        strip_prefix: what to remove from the beginning of tensor names of either side, such as
            `_orig_mod.`.
    """

    extra_rows: str = "instruct"
    one_sided: str | None = None
    ignore_config: tuple[str, ...] = ()
    strip_prefix: str = ""

    @classmethod
    def of(
        cls,
        extra_rows: str = "instruct",
        one_sided: str | None = None,
        ignore_config: Iterable[str] = (),
        strip_prefix: str = "",
    ) -> PairOptions:
        """The options as a caller gives them, checked.

        Raises:
            UsageError: no such policy.
        """
        if extra_rows not in EXTRA_ROWS:
            expected = f"expected {' or '.join(EXTRA_ROWS)}"
            raise UsageError(
                f"extra rows `{extra_rows}`: {expected}", "instruct keeps them, refuse does not"
            )
        if one_sided is not None and one_sided not in ONE_SIDED:
            expected = f"expected {', '.join(ONE_SIDED[:-1])} or {ONE_SIDED[-1]}"
            raise UsageError(
                f"one-sided tensors `{one_sided}`: {expected}", "keep writes them as they are"
            )
        if not isinstance(strip_prefix, str):
            raise UsageError(f"prefix {strip_prefix!r}: expected text", "such as _orig_mod.")
        keys = (ignore_config,) if isinstance(ignore_config, str) else tuple(ignore_config)
        return cls(extra_rows, one_sided, keys, strip_prefix)

    def document(self) -> dict[str, Any]:
        """The options as JSON values, those that are not as by default."""
        default = PairOptions()
        found = {
            name: value for name, value in vars(self).items() if value != getattr(default, name)
        }
        return {
            "extra_rows": self.extra_rows,
            **{k: list(v) if isinstance(v, tuple) else v for k, v in found.items()},
        }

    @classmethod
    def read(cls, document: Mapping[str, Any]) -> PairOptions:
        """The options that `document`, which may say more, holds.

        Raises:
            UsageError: no such policy.
            TypeError: a value is of another type.
        """
        found = {name: document[name] for name in vars(cls()) if name in document}
        if not all(isinstance(key, str) for key in found.get("ignore_config", ())):
            raise TypeError
        return cls.of(**found)

    def arguments(self) -> list[str]:
        """The options of the command line that say the same."""
        found = [] if self.extra_rows == "instruct" else ["--extra-rows", self.extra_rows]
        found += [] if self.one_sided is None else ["--one-sided", self.one_sided]
        found += [part for key in self.ignore_config for part in ("--ignore-config", key)]
        return found + (["--strip-prefix", self.strip_prefix] if self.strip_prefix else [])


DEFAULTS = PairOptions()
