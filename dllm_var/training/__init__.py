"""One optimizer step, and what keeps a run alive: optimizers, strategies, checkpoints, resume, signals."""
