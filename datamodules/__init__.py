"""Data sources and data modules, imported as dllm_var.datamodules."""
