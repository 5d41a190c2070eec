"""Memory that is fragmented on purpose."""

from __future__ import annotations

import mmap

import torch


def fragmented(free_bytes: int) -> mmap.mmap:
    """Leave `free_bytes` of free memory as single pages that are no neighbours, as hours of other
    work do. The system hands such pages out first.

    Returns:
        The pages between, of as many bytes, which keep those apart until it is closed.
    """
    pages = mmap.mmap(-1, 2 * free_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages.madvise(mmap.MADV_NOHUGEPAGE)
    torch.frombuffer(pages, dtype=torch.uint8).fill_(1)
    for start in range(0, 2 * free_bytes, 2 * mmap.PAGESIZE):
        pages.madvise(mmap.MADV_DONTNEED, start, mmap.PAGESIZE)
    return pages
