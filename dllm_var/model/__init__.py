"""The transformer, its KV cache and checkpoints."""

from dllm_var.model.kv_cache import KVCache
from dllm_var.model.transformer import Transformer, TransformerConfig

__all__ = ["KVCache", "Transformer", "TransformerConfig"]
