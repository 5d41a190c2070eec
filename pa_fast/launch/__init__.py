"""More than one process for one sweep: workers on Ray, or shards that torchrun and SLURM start."""
