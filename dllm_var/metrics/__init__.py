"""What is measured: how answers end, what they get wrong, what parallelism costs, and the losses of validation."""

from dllm_var.metrics.answers import AnswerMetrics, align, edit_distance, nearest_reference
from dllm_var.metrics.denoising import DenoisingMetrics
from dllm_var.metrics.parallelism import aup

__all__ = ["AnswerMetrics", "DenoisingMetrics", "align", "aup", "edit_distance", "nearest_reference"]
