"""Lightning callbacks, imported as dllm_var.callbacks: what is shown, measured and written while a model trains."""

from dllm_var.callbacks.answers import AnswerWriter
from dllm_var.callbacks.ema import EmaWeights
from dllm_var.callbacks.export import ExportWeights
from dllm_var.callbacks.progress import ProgressBar
from dllm_var.callbacks.sampling import SamplingCallback
from dllm_var.callbacks.speed import SpeedMonitor
from dllm_var.callbacks.summary import RunSummary

__all__ = [
    "AnswerWriter",
    "EmaWeights",
    "ExportWeights",
    "ProgressBar",
    "RunSummary",
    "SamplingCallback",
    "SpeedMonitor",
]
