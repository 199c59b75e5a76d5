"""Metrics: how answers end and what they get wrong, the losses of validation, what parallelism costs in accuracy."""

from dllm_var.metrics.answers import AnswerMetrics, nearest_reference
from dllm_var.metrics.denoising import DenoisingMetrics
from dllm_var.metrics.parallelism import aup

__all__ = ["AnswerMetrics", "DenoisingMetrics", "aup", "nearest_reference"]
