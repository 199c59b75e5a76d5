"""The commands that do not train; dllm_var/__main__.py lists them."""
