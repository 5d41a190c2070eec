"""Programs that run as they are from the repository root: `python -m examples.demo.train`, for
one."""
