"""Sweeps in more than one process: Ray workers, or shards that torchrun or SLURM starts."""
