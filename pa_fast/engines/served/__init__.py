"""What engines that serve have in common: live weights in their worker processes, and their proof.

In a worker, `WorkerWeights` makes the parameters of the engine's model follow λ, with what a
`Stack` knows of the engine. In the driver, `EngineWeights` sets λ in all workers, and `ServedModel`
proves answers and drops what the engine keeps of the last λ. How a checkpoint lies in the
parameters is learned through the engine's own loading (`layout`).
"""
