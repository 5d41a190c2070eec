"""Is lm-eval here, and new enough?"""

from __future__ import annotations

import importlib.metadata
import importlib.util

from pa_fast.errors import MissingExtra

OLDEST = (0, 4, 13)
INSTALL = "pip install 'pa_fast[eval]'"


def require_lm_eval() -> str:
    """lm-eval's version.

    Raises:
        MissingExtra: it, or accelerate which its model class imports, is not installed or too old.
    """
    for package in ("lm_eval", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise MissingExtra(
                f"lm-eval tasks need the package {package}, which is not installed", INSTALL
            )
    version = importlib.metadata.version("lm_eval")
    numbers = tuple(int(part) for part in version.split(".")[:3] if part.isdigit())
    if numbers < OLDEST:
        raise MissingExtra(
            f"found lm_eval {version}, expected {'.'.join(map(str, OLDEST))} or later", INSTALL
        )
    return version
