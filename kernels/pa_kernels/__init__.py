"""Tensors in, tensors out: the arithmetic of λ, as Triton kernels on a GPU and as torch on the CPU, with the same bits."""

from pa_kernels import reference
from pa_kernels.checksum import checksum
from pa_kernels.lerp import Lerp, lerp_

__all__ = ["Lerp", "checksum", "lerp_", "reference"]
