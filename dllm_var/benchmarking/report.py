"""Reports of a benchmark, made from its JSON alone: tables and findings."""

from collections.abc import Sequence
from typing import Any

from dllm_var.benchmarking.instruments import PHASES
from dllm_var.benchmarking.results import EQUAL
from dllm_var.benchmarking.settings import BASELINES, PLAIN_LOOP

MISSING = "-"
Figures = dict[str, Any]
Column = tuple[str, str, str, float]  # header, path of the value in a result, format, factor
MS, MB = 1e3, 2.0**-20

ANSWERS: tuple[Column, ...] = (
    ("accuracy", "accuracy", "{:.1%}", 1),
    ("exact", "exact_match", "{:.1%}", 1),
    ("ended by eos", "ended_by_eos", "{:.1%}", 1),
    ("early", "premature", "{:.1%}", 1),
    ("late", "overrun", "{:.1%}", 1),
    ("length error", "length_error", "{:.2f}", 1),
    ("hit limit", "hit_limit", "{:.1%}", 1),
    ("accepted", "introspective_acceptance", "{:.1%}", 1),
    ("prompts", "prompts", "{:,}", 1),
)
SPEED: tuple[Column, ...] = (
    ("accuracy", "accuracy", "{:.1%}", 1),
    ("NFE", "nfe", "{:.1f}", 1),
    ("tok/fwd", "tokens_per_forward", "{:.2f}", 1),
    ("tok/s", "single.tokens_per_second", "{:,.0f}", 1),
    ("ms/req", "single.seconds_per_request", "{:,.1f}", MS),
    ("overhead", "single.sampler_overhead", "{:.0%}", 1),
    ("MB", "peak_memory_bytes.single", "{:.1f}", MB),
    ("x AR", "over_autoregressive", "{:.2f}", 1),
    ("x AR fwd", "forwards_over_autoregressive", "{:.2f}", 1),
    ("tok/s", "batched.tokens_per_second", "{:,.0f}", 1),
    ("ms/req", "batched.seconds_per_request", "{:,.1f}", MS),
    ("MB", "peak_memory_bytes.batched", "{:.1f}", MB),
    ("x AR", "over_autoregressive_batched", "{:.2f}", 1),
)
TRAINING: tuple[Column, ...] = (
    ("tokens/s", "tokens_per_second", "{:,.0f}", 1),
    ("x plain", "over_plain_loop.tokens_per_second", "{:.2f}", 1),
    ("x padded", "over_plain_loop.over_padded", "{:.2f}", 1),
    ("MFU", "mfu", "{:.0%}", 1),
    ("ms/step", "step_seconds", "{:,.0f}", MS),
    *((phase.replace("_", " "), f"phase_seconds.{phase}", "{:,.1f}", MS) for phase in PHASES),
    ("MB", "peak_memory_bytes", "{:,.0f}", MB),
    ("first s", "warm_up_seconds", "{:,.0f}", 1),
)
DECODING: tuple[Column, ...] = (("ms/forward", "milliseconds", "{:,.2f}", 1), ("x graph", "over_graph", "{:.2f}", 1))
RATIOS = {
    "over_fixed_length": "useful tokens/s over fixed-length diffusion",
    "over_autoregressive": "useful tokens/s over the autoregressive twin",
    "batch_32_over_1": "batched throughput over batch 1",
    "sampler_overhead": "time outside the model's forwards",
}
AT_EQUAL_ACCURACY = {
    "over_autoregressive": "useful tokens/s, batch 1",
    "over_autoregressive_batched": "useful tokens/s, batches of {batch_size}",
    "forwards_over_autoregressive": "useful tokens per forward",
}
SAMPLERS_NOTE = (
    "The last four columns are for batches of {batch_size}, those before for batch 1. accepted: share of the drafted "
    "tokens that the model confirmed. NFE: forwards per request, of all models. tok: useful tokens. MB: peak memory "
    "beyond the models. x AR: tokens/s over the autoregressive twin's; x AR fwd: the same where a forward costs the "
    "same whatever its width, which is a GPU's cost model. "
    "In ratios, an answer of fixed-length diffusion counts with at least its reference's tokens."
)
AUP_NOTE = (
    "AUP, accuracy under parallelism: the area under a curve of accuracy (in %) over tokens per forward, with less "
    "weight for lost accuracy. One token per forward without a mistake is 100; more is better."
)
TRAINING_NOTE = (
    "tokens/s counts tokens of samples, not padding. x plain, x padded: over the plain loop of packed rows, and of "
    "padded samples, within each round. Phases in ms per step. MFU: FLOPs the task needs (forward and backward, pairs "
    "of tokens that attend, head where a loss is, nothing recomputed) over the fastest matrix product of the same "
    "round. MB: weights, gradients, optimizer state and activations at their peak. first s: seconds to build the "
    "model, compile it and make its first step."
)
DECODING_NOTE = (
    "Time of a forward with all around it: the sampler's or loop's, divided by its forwards. x graph: over the bare "
    "forward of as many tokens, replayed as a CUDA graph."
)


def report(title: str, result: Figures, pictures: Sequence[str] = ()) -> str:
    """Returns a benchmark's report in Markdown, with columns aligned for a terminal and links to its pictures."""
    machine = result["machine"]
    marks = [word for word in ("partial", "quick") if result.get(word)]
    lines = [
        f"# {title}",
        "",
        *([f"{' and '.join(marks)} run: not for comparison  "] if marks else []),
        f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, device {machine['device']}, "
        f"torch {machine['torch']}, commit {machine['commit'] or 'unknown'}, {result['date']}  ",
        f"{result['repeats']} rounds in turn, medians; {result['seconds']:.0f} s in all: `{result['command']}`",
    ]
    for task in result.get("tasks", []):
        lines += ["", *_task_lines(task)]
    for case in result.get("decodings", []):
        lines += ["", *_decoding_lines(case)]
    for case in result.get("trainings", []):
        lines += ["", *_training_lines(case)]
    for picture in pictures:
        lines += ["", f"![accuracy and speed]({picture})"]
    return "\n".join(lines) + "\n"


def _task_lines(task: Figures) -> list[str]:
    lines = [f"## {task['name']}: {task['checkpoint']}, {task['parameters']:,} weights, {task['split']} split", ""]
    for columns in (ANSWERS, SPEED):
        lines += [*_aligned(_rows(columns, task["settings"], task["chosen"])), ""]
    lines += [SAMPLERS_NOTE.format(**task), ""]
    if others := _checkpoint_lines(task):
        lines += ["Checkpoints beside the first one:", "", *others, ""]
    if costs := task["per_forward"]:
        header = ["tokens of a forward", *(str(cost["width"]) for cost in costs)]
        times = ["ms", *(f"{1000 * cost['seconds']:.2f}" for cost in costs)]
        relative = ["over one token's", *(f"{cost['relative']:.2f}" for cost in costs)]
        lines += [*_aligned([header, times, relative]), ""]
    for curve in task["curves"]:
        points = [f"{p['value']}: {p['accuracy']:.1%} at {p['tokens_per_forward']:.2f}" for p in curve["points"]]
        area = "not measured"
        if curve["aup"] is not None:
            area = f"AUP {curve['aup']:.1f} (accuracy at tokens/forward: {'; '.join(points)})"
        lines.append(f"- {curve['name']}: {area}")
    lines += ["", AUP_NOTE, ""] if task["curves"] else []
    lines += _equal_accuracy_lines(task)
    if task["chosen"] is None:
        return [*lines, "- no entry has role default: no best setting is chosen and no ratio is taken"]
    lines.append(f"- * {task['chosen']}: {task['rule']}.")
    for name, label in RATIOS.items():
        if name in task["bars"]:
            lines.append(_bar_line(label, name, task["bars"][name]))
        elif (value := task["ratios"].get(name)) is not None:
            lines.append(f"- {label}: {_ratio(name, value)}")
    if over_fixed := task["ratios"].get("forwards_over_fixed_length"):
        lines.append(f"- useful tokens per forward over fixed-length diffusion: {over_fixed:.2f}x")
    return lines


def _equal_accuracy_lines(task: Figures) -> list[str]:
    """Returns the best settings of the twin's accuracy, with the accuracies on which this rests."""
    named = task.get("at_equal_accuracy")
    if not named:
        return []
    settings = {setting["name"]: setting for setting in task["settings"]}
    twin = next(setting for setting in task["settings"] if setting["role"] == "autoregressive")
    split, other = task["split"], task["selection_split"]
    lines = [
        f"- over the autoregressive twin at equal accuracy (at most {100 * EQUAL:g} point below its {_shares(twin)} on "
        f"the {split} split, {other} split in brackets; chosen by speed on the {other} split):"
    ]
    for ratio, name in named.items():
        value, label = task[f"{ratio}_at_equal_accuracy"], AT_EQUAL_ACCURACY[ratio].format(**task)
        lines.append(f"  - {label}: {value:.2f}x by {name}, {_shares(settings[name])}")
    return lines


def _shares(setting: Figures) -> str:
    return f"{setting['accuracy']:.1%} ({setting['selection']['accuracy']:.1%})"


def _checkpoint_lines(task: Figures) -> list[str]:
    """Returns the checkpoints beside the task's own, with their sizes and the settings that decode them."""
    paths = {"autoregressive": task["autoregressive_checkpoint"]}
    found: dict[str, tuple[int, list[str]]] = {}
    for setting in task["settings"]:
        if "parameters" in setting and setting["checkpoint"] not in ("diffusion", task["checkpoint"]):
            path = paths.get(setting["checkpoint"], setting["checkpoint"])
            found.setdefault(path, (setting["parameters"], []))[1].append(setting["name"])
    return [f"- {path}, {size:,} weights: {', '.join(names)}" for path, (size, names) in found.items()]


def _training_lines(case: Figures) -> list[str]:
    peak = case["gemm_peak_flops"]
    title = (
        f"## {case['name']}: {case['parameters']:,} weights, vocabulary {case['vocab_size']:,}, "
        f"{case['batch_size']} x {case['context_length']} tokens per step"
        + (f", matrix products at {peak / 1e9:,.0f} GFLOP/s" if peak else "")
    )
    contenders = [{**one, "over_plain_loop": case["over_plain_loop"].get(one["name"])} for one in case["contenders"]]
    lines = [title, "", *_aligned(_rows(TRAINING, contenders, case["ours"])), "", TRAINING_NOTE, ""]
    if planned := case.get("planned"):
        lines.append(
            f"- `plan` says {MS * planned['seconds']:,.0f} ms/step at {planned['mfu']:.0%} of the products' speed, and "
            f"{MB * planned['memory']:,.0f} MB"
        )
    lines += _failures(case)
    for name, bar in case["bars"].items():
        base = next((base for ratio, base in BASELINES.items() if name.startswith(ratio)), PLAIN_LOOP)
        of = "" if name.startswith("mfu") else f" of {case['ours']} over {base}"
        lines.append(_bar_line(name + of, name, bar))
    return lines


def _decoding_lines(case: Figures) -> list[str]:
    title = (
        f"## {case['name']}: {case['parameters']:,} weights, vocabulary {case['vocab_size']:,}, prompts of "
        f"{case['prompt_tokens']} tokens, blocks of {case['block_length']}, batches of {case['batch_size']}"
    )
    lines = [title, "", *_aligned(_rows(DECODING, case["ways"], None)), "", DECODING_NOTE, ""]
    if case["bandwidth"]:
        lines.append(
            f"- memory copies at {case['bandwidth'] / 1e12:.2f} TB/s: the weights are read in "
            f"{case['read_weights_ms']:.2f} ms"
        )
    if case["peak_memory_bytes"]:
        lines.append(f"- {case['peak_memory_bytes'] / 2**30:.1f} GiB at the peak")
    return [*lines, *_failures(case), *(_bar_line(name, name, bar) for name, bar in case["bars"].items())]


def _failures(case: Figures) -> list[str]:
    return [f"- {name} failed: {message}" for name, message in case.get("failed", {}).items()]


def _rows(columns: Sequence[Column], results: Sequence[Figures], best: str | None) -> list[list[str]]:
    """Returns the cells of a table of results, its header first; the best one is marked."""
    rows = [["", *(header for header, *_ in columns)]]
    for result in results:
        row = [f"{result['name']} *" if result["name"] == best else result["name"]]
        for _, path, form, scale in columns:
            value: Any = result
            for key in path.split("."):
                value = value.get(key) if isinstance(value, dict) else None
            row.append(MISSING if value is None else form.format(scale * value))
        rows.append(row)
    return rows


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Returns a Markdown table whose columns are as wide as their widest cells; the first row is its header."""
    rows = [[cell.replace("|", "/") for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for name, *cells in rows:
        numbers = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append(f"| {' | '.join([name.ljust(widths[0]), *numbers])} |")
    rule = f"|{'-' * (widths[0] + 2)}|{''.join('-' * (width + 1) + ':|' for width in widths[1:])}"
    return [lines[0], rule, *lines[1:]]


def _bar_line(label: str, name: str, bar: Figures) -> str:
    verdict = {True: "pass", False: "FAIL", None: "not measured" if bar["value"] is None else "not judged"}
    value = MISSING if bar["value"] is None else _ratio(name, bar["value"])
    sign = ">=" if bar["direction"] == "at least" else "<="
    return f"- {label}: {value} ({sign} {_ratio(name, bar['bar'])}: {verdict[bar['passed']]})"


def _ratio(name: str, value: float) -> str:
    return f"{value:.0%}" if name.startswith(("mfu", "sampler_overhead")) else f"{value:.2f}x"
