"""The content fingerprint of a checkpoint, a number over every weight, independent of the sharding;
and the files that describe a merge.

    F = Σ_t odd(name_t) · S_t mod 2^64,   S_t = `pa_kernels.checksum` of tensor t

Live weights are summed the same way, so the two can be compared if their layouts agree.
"""

from __future__ import annotations

import copy
import hashlib
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pa_fast.base import Lambda
from pa_fast.checkpoint.folder import PROVENANCE
from pa_fast.checkpoint.pair import DEFAULTS, PairOptions, TiedHead
from pa_fast.checkpoint.safetensors import read_object
from pa_fast.checkpoint.streaming import MergeSpec
from pa_fast.checkpoint.vocabulary import KeptRows
from pa_fast.errors import CheckpointError, UsageError
from pa_fast.foreign import one_line
from pa_fast.rounding import Rounding
from pa_fast.rules import LambdaRule


def name_hash(name: str) -> int:
    """Return odd(name): an odd 64-bit number from blake2b of the UTF-8 name."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little") | 1


def combine(sums: Mapping[str, int]) -> int:
    """Return Σ odd(name) · S mod 2^64 over checksums by tensor name."""
    return sum(name_hash(name) * value for name, value in sums.items()) % 2**64


def as_hex(value: int) -> str:
    """Return a 64-bit number as 16 hex digits, its form in every file."""
    return f"{value:016x}"


# --- card
#
# A merged checkpoint describes itself: README.md for people, pa_fast.json for programs, config.json
# for loaders.

FORMAT = 1
CHECKSUM_VERSION = 2
"""Of the content fingerprints: that of `pa_kernels.reference`, which this module does not import.
Files without a `checksum` have version 1."""
_ANOTHER = "it was written by another version of pa_fast, or edited"


@dataclass(frozen=True)
class SideRecord:
    """One side of a merge: as the user named it, its hub commit if it has one, and its
    fingerprints."""

    source: str
    revision: str | None
    quick_fingerprint: str
    content_fingerprint: str


@dataclass(frozen=True)
class ChosenFrom:
    """The run that λ was chosen from: its folder as the user named it, its question, and its answer
    in one sentence."""

    run: str
    objective: str
    keep: Mapping[str, float]
    answer: str


@dataclass(frozen=True)
class Provenance:
    """Everything that decides the bits of a merge, and where its λ is from.

    Attributes:
        spec, dtype, options: of the merge.
        tied, kept, notes: those of `Pair`. They follow from the sources and are not read back.
        store: description of the store that the live weights were saved from, if it is lossy.
        chosen_from: the run whose answer is λ, if it is one's; not read back either.
    """

    base: SideRecord
    instruct: SideRecord
    spec: MergeSpec
    dtype: str
    options: PairOptions = DEFAULTS
    tied: TiedHead | None = None
    kept: tuple[KeptRows, ...] = ()
    notes: tuple[str, ...] = ()
    store: str | None = None
    chosen_from: ChosenFrom | None = None

    def to_json(self, files: Sequence[str] = ()) -> str:
        """Return the text of pa_fast.json. A later merge may replace `files`, the names of all
        files of this one."""
        sides = {"base": vars(self.base), "instruct": vars(self.instruct)}
        rounding, rule = self.spec.rounding, self.spec.rule
        how = {
            "lambda": self.spec.lam.key,
            "rounding": rounding.mode,
            "seed": rounding.seed,
            "rule": None if rule is None else rule.document(),
            "dtype": self.dtype,
            **self.options.document(),
            "tied_head": None if self.tied is None else vars(self.tied),
            "kept_rows": [vars(one) for one in self.kept],
            "files": list(files),
            "notes": list(self.notes),
            **({} if self.store is None else {"store": self.store}),
            **({} if self.chosen_from is None else {"chosen_from": asdict(self.chosen_from)}),
        }
        return (
            json.dumps(
                {
                    "format": FORMAT,
                    "version": _version(),
                    "checksum": CHECKSUM_VERSION,
                    **how,
                    **sides,
                },
                indent=1,
                ensure_ascii=False,
            )
            + "\n"
        )


def read_provenance(folder: Path) -> Provenance | None:
    """Read the provenance of a merged folder; None if it has no pa_fast.json.

    Raises:
        CheckpointError: the file is of a form that this version does not read.
    """
    file = folder / PROVENANCE
    if not file.exists():
        return None
    document = read_object(file)
    try:
        if document["format"] != FORMAT:
            raise ValueError
        base, instruct = (
            SideRecord(**{key: document[side][key] for key in SideRecord.__annotations__})
            for side in ("base", "instruct")
        )
        lam, dtype, rule, options = (
            document["lambda"],
            document["dtype"],
            document["rule"],
            PairOptions.read(document),
        )
        if not isinstance(lam, str) or not isinstance(dtype, str):
            raise TypeError
        rounding = Rounding(document["rounding"], document.get("seed"))
        if rounding.is_stochastic and document.get("seed") is None:
            raise ValueError
        spec = MergeSpec(
            Lambda(lam),
            rounding,
            None if rule is None else LambdaRule(rule, lam, where=f"{file}: rule"),
        )
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(
            f"{file}: expected format {FORMAT}, with λ, dtype, rounding and rule", _ANOTHER
        ) from None
    except UsageError as error:
        message = (
            error.message if error.message.startswith(str(file)) else f"{file}: {error.message}"
        )
        raise CheckpointError(message, _ANOTHER) from None
    store = document.get("store")
    return Provenance(
        base, instruct, spec, dtype, options, store=store if isinstance(store, str) else None
    )


def model_card(provenance: Provenance, out: str, hub_ids: Sequence[str] = ()) -> str:
    """Return README.md of a merged checkpoint: front matter for the hub, the formula, λ and the
    command to reproduce it.

    Args:
        hub_ids: those of the sources that come from the hub. The hub accepts nothing else as
            `base_model`: it refuses a whole upload because of a local path there.
    """
    base, instruct = one_line(provenance.base.source), one_line(provenance.instruct.source)
    lam = provenance.spec.lam.key
    rounding, rule = provenance.spec.rounding, provenance.spec.rule
    options = [] if provenance.dtype == "auto" else ["--dtype", provenance.dtype]
    options += (
        ["--rounding", rounding.mode, "--seed", str(rounding.seed)]
        if rounding.is_stochastic
        else []
    )
    options += ["--rule", "rule.yaml"] if rule else []
    options += provenance.options.arguments()
    rows = (
        "".join(f"    - {json.dumps(row, ensure_ascii=False)}\n" for row in rule.document())
        if rule
        else ""
    )
    ruled = f"λ of each tensor by the rule\n\n{rows}\n" if rule else ""
    remarks = [*([str(provenance.tied)] if provenance.tied else []), *map(str, provenance.kept)]
    if provenance.store is not None:
        remarks.append(
            f"saved from live weights whose delta was held as {one_line(provenance.store)}, which"
            " loses some of it: near to the merge below, and not its bits"
        )
    chosen = "" if provenance.chosen_from is None else _chosen(provenance.chosen_from)
    apart = "".join(f"- {one}\n" for one in remarks) + "\n" if remarks else ""
    # = because a negative λ would read as an option
    command = shlex.join(
        ["pa-fast", "merge", base, instruct, f"--lambda={lam}", "--out", one_line(out), *options]
    )
    names = "".join(f"- {json.dumps(name)}\n" for name in dict.fromkeys(hub_ids))
    models = f"base_model:\n{names}base_model_relation: merge\n" if names else ""
    return (
        f"---\n{models}library_name: transformers\ntags:\n- merge\n- pa_fast\n---\n\n# Partial"
        f" adaptation, λ = {lam}\n\nA point on the line between a base checkpoint B and its"
        f" instruct checkpoint I:\n\n    W = B + λ (I − B)        λ = {lam}\n    B   {base}\n    I "
        f"  {instruct}\n\n{chosen}{ruled}Computed in fp32 and rounded once ({rounding})."
        f"\nTokenizer, chat template and generation settings are those of I.\n\n{apart}   "
        f" {command}\n\n`{PROVENANCE}` holds the fingerprints of both sources; `pa-fast verify`"
        " checks every bit against them.\n"
    )


def _chosen(chosen: ChosenFrom) -> str:
    """Return the paragraph of the model card on the run that λ was chosen from."""
    limits = ", ".join(f"{one_line(n)} ≥ {100 * share:g} %" for n, share in chosen.keep.items())
    rows = {
        "run": one_line(chosen.run),
        "objective": one_line(chosen.objective),
        **({"keep": limits} if limits else {}),
        "answer": one_line(chosen.answer),
    }
    # indented as code: names of files and evaluators are no markup
    listed = "".join(f"    {name:<10} {text}\n" for name, text in rows.items())
    return f"λ was chosen from a sweep:\n\n{listed}\n"


def merged_config(text: bytes, config: dict[str, Any], dtype: str) -> bytes:
    """Return config.json of the merge: instruct's bytes unchanged, or with the dtype keys set if
    `dtype` is not auto."""
    if dtype == "auto":
        return text
    changed = copy.deepcopy(config)
    parts = [changed, *(value for value in changed.values() if isinstance(value, dict))]
    keyed = [(part, key) for part in parts for key in ("dtype", "torch_dtype") if key in part]
    for part, key in keyed or [(changed, "torch_dtype")]:
        part[key] = dtype
    return (json.dumps(changed, indent=2, ensure_ascii=False) + "\n").encode()


def _version() -> str:
    try:
        return version("pa_fast")
    except PackageNotFoundError:
        return "not installed"
