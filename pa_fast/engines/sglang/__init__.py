"""SGLang as a live engine: the parameters of its ranks follow λ in place.

Checked against the source of SGLang 0.5.23 and against fakes; not run for real. The driver's part
is `engine` and `workers`; `worker` runs in SGLang's scheduler processes, one a rank. What it shares
with the vLLM engine is in `pa_fast.engines.served`.
"""
