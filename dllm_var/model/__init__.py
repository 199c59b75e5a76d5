"""The transformer, its KV cache and checkpoints."""

from dllm_var.model.config import TransformerConfig
from dllm_var.model.kv_cache import KVCache
from dllm_var.model.transformer import Transformer

__all__ = ["KVCache", "Transformer", "TransformerConfig"]
