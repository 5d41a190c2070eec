"""Which shard a process is: by what torchrun and SLURM say."""

from __future__ import annotations

import pytest

from pa_fast.errors import UsageError
from pa_fast.launch.environment import shard

ARRAY = {
    "SLURM_ARRAY_TASK_ID": "5",
    "SLURM_ARRAY_TASK_COUNT": "4",
    "SLURM_ARRAY_TASK_MIN": "3",
    "SLURM_ARRAY_TASK_MAX": "6",
}
TASKS = {"SLURM_PROCID": "1", "SLURM_NTASKS": "8"}
TORCHRUN = {"RANK": "0", "WORLD_SIZE": "2"}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        (TORCHRUN, (0, 2)),
        (ARRAY, (2, 4)),
        (TASKS, (1, 8)),
        (TASKS | ARRAY, (2, 4)),
        (TASKS | ARRAY | TORCHRUN, (0, 2)),
    ],
)
def test_the_environment_says_which_shard(
    environ: dict[str, str], expected: tuple[int, int]
) -> None:
    assert shard(environ) == expected


@pytest.mark.parametrize(
    ("environ", "why"),
    [
        ({}, "neither torchrun's RANK nor SLURM's"),
        ({"RANK": "0"}, "neither torchrun's RANK nor SLURM's"),
        ({"RANK": "zero", "WORLD_SIZE": "2"}, "RANK is `zero`"),
        ({**ARRAY, "SLURM_ARRAY_TASK_MAX": "9"}, "without gaps"),
        ({**ARRAY, "SLURM_ARRAY_TASK_MIN": ""}, "SLURM_ARRAY_TASK_MIN is ``"),
    ],
)
def test_what_it_does_not_say_is_not_guessed(environ: dict[str, str], why: str) -> None:
    with pytest.raises(UsageError, match=why):
        shard(environ)
