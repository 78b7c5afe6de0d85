"""Engines with the surface that OpenRLHF's trainer holds as `vllm_engines`: a list of Ray actors."""
