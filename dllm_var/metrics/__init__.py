"""What is measured: how answers end, what they get wrong, and the losses of validation."""

from dllm_var.metrics.answers import AnswerMetrics, align, edit_distance, nearest_reference
from dllm_var.metrics.denoising import DenoisingMetrics

__all__ = ["AnswerMetrics", "DenoisingMetrics", "align", "edit_distance", "nearest_reference"]
