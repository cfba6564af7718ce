"""What runs a model for a trace, besides the process that asks: Ray, vLLM and NDIF. `workbench.capture` is the rest."""
