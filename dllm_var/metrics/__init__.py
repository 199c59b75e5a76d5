"""Metrics: how answers end and what they get wrong, and the losses of validation."""

from dllm_var.metrics.answers import AnswerMetrics, nearest_reference
from dllm_var.metrics.denoising import DenoisingMetrics

__all__ = ["AnswerMetrics", "DenoisingMetrics", "nearest_reference"]
