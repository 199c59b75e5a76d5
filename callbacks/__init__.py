"""Lightning callbacks, imported as dllm_var.callbacks."""
