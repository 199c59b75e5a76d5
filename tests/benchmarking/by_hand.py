"""Settings with measurements written down by hand."""

from dllm_var.benchmarking.contenders import Contender, Run
from dllm_var.benchmarking.settings import Setting
from dllm_var.sampling import Generation


def run(tokens, nfe, seconds, forward_share=0.9, per_call=True):
    """A run whose prompts have the given answer lengths, forwards and seconds."""
    answers = [
        Generation(list(range(length)), "eos", forwards, 0.5, prompt_length=3)
        for length, forwards in zip(tokens, nfe, strict=True)
    ]
    calls = list(seconds) if per_call else [sum(seconds)]
    return Run(answers, calls, forward_share * sum(seconds), sum(nfe))


def contender(name, role="candidate", single=(), batched=(), selection=None, scores=None):
    """A setting that has been measured.

    Args:
        name: Its name.
        role: Its role.
        single: Timed runs at batch 1.
        batched: Timed runs in batches.
        selection: Accuracy and tokens/s on the selection split.
        scores: Figures of its answers.
    """
    setting = Setting(name, {"class_path": "some.Sampler", "init_args": {}}, "diffusion", role, 4, 4, 4)
    result = Contender(setting, sampler=None, model=None, single=list(single), batched=list(batched))
    result.scores = scores or {}
    if selection is not None:
        accuracy, speed = selection
        result.selection_scores = {"accuracy": accuracy}
        result.selection_single = [run([speed], [1], [1.0])] if speed else []
    return result
