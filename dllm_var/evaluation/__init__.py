"""Standard evaluation: a checkpoint as a model of lm-evaluation-harness (https://github.com/EleutherAI)."""

from pathlib import Path

TASKS = Path(__file__).parent / "tasks"  # the tasks that ship: YAML as lm-eval reads it, JSONL beside it
