"""λ-parallel sweeps on Ray, under a short name: `sweep` of `pa_fast.launch.ray`."""

from __future__ import annotations

from pa_fast.launch.ray import sweep

__all__ = ["sweep"]
