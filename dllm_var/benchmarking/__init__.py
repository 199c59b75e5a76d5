"""What `python -m dllm_var benchmark` measures: samplers side by side, on one machine and in turn."""

from dllm_var.benchmarking.scorers import FinalNumberScorer, Scorer, TokenErrorScorer

__all__ = ["FinalNumberScorer", "Scorer", "TokenErrorScorer"]
