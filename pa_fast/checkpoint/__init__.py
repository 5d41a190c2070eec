"""Files ↔ tensors: open checkpoints from their headers, pair them, merge them to disk, check a merge."""

from pa_fast.checkpoint.fingerprint import name_hash
from pa_fast.checkpoint.header import TensorInfo
from pa_fast.checkpoint.inspect import PairReport, inspect
from pa_fast.checkpoint.merge import MergeReport, merge
from pa_fast.checkpoint.pairing import Pair, pair
from pa_fast.checkpoint.reader import Checkpoint
from pa_fast.checkpoint.source import resolve
from pa_fast.checkpoint.verify import VerifyReport, verify
from pa_fast.checkpoint.vocabulary import compare_vocabularies

__all__ = [
    "Checkpoint",
    "MergeReport",
    "Pair",
    "PairReport",
    "TensorInfo",
    "VerifyReport",
    "compare_vocabularies",
    "inspect",
    "merge",
    "name_hash",
    "pair",
    "resolve",
    "verify",
]
