"""Tensors in, tensors out: the arithmetic of λ, as Triton kernels on a GPU and as torch on the CPU,
with the same bits.

Only the sums of low-rank products have an order, and so last bits, of their own on each device.
"""

from pa_kernels import reference
from pa_kernels.checksum import Checksum, checksum
from pa_kernels.dense import Lerp, lerp_
from pa_kernels.lowrank import LowRank, lowrank_merge_
from pa_kernels.packed import Packed, PackedTensor, packed_switch_
from pa_kernels.sparse import Sparse, SparseTensor, sparse_set_
from pa_kernels.svd import truncated_svd

__all__ = [
    "Checksum",
    "Lerp",
    "LowRank",
    "Packed",
    "PackedTensor",
    "Sparse",
    "SparseTensor",
    "checksum",
    "lerp_",
    "lowrank_merge_",
    "packed_switch_",
    "reference",
    "sparse_set_",
    "truncated_svd",
]
