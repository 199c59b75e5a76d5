"""What is masked and what the loss is."""

from dllm_var.objectives.autoregressive import Autoregressive
from dllm_var.objectives.base import NoisedBatch, Objective
from dllm_var.objectives.eos_schedule import EosSchedule
from dllm_var.objectives.mdlm import Mdlm
from dllm_var.objectives.noise import KeyedNoise

__all__ = ["Autoregressive", "EosSchedule", "KeyedNoise", "Mdlm", "NoisedBatch", "Objective"]
