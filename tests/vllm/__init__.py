"""The vLLM engine against unmodified engines on merged folders, in an environment that has vLLM:
`make vllm`. Elsewhere these modules are not collected."""
