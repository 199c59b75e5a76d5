"""Benchmarks: samplers, and ways to train, measured side by side on one machine and in turn."""

from dllm_var.benchmarking.scorers import FinalNumberScorer, Scorer, TokenErrorScorer

__all__ = ["FinalNumberScorer", "Scorer", "TokenErrorScorer"]
