"""From files to tensors and back: published families, safetensors, checkpoints of runs."""
