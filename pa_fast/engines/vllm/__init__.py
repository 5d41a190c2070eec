"""vLLM as a live engine: the parameters of its workers follow λ in place.

The driver's part is `engine` and `weights`; `worker`, `loader` and `transfer` run in vLLM's worker
processes. Everything that is known of vLLM's layout is learned through its own loading (`layout`),
and proven before the first λ. Run with the CPU build of vLLM 0.32.0; not run on a GPU yet.
"""
