"""The sparse step and the encoder of TopK SAEs, on CPUs and GPUs."""
