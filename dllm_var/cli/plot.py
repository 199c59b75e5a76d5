"""The command `plot`: the training curves of runs, as a picture."""

import csv
import os
from collections import defaultdict
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from dllm_var.errors import UserError
from dllm_var.files import write_atomically
from dllm_var.settings import SettingsParser, suggestion

DESCRIPTION = """Draws the training curves of runs as a PNG, from the TensorBoard events or the metrics.csv in their
folders. Thin lines are training, lines with dots are validation and sampled answers; several runs share a picture."""
EXAMPLES = """examples:
  python -m dllm_var plot runs/quickstart/version_0
  python -m dllm_var plot runs/quickstart runs/cmudict --output comparison.png
  python -m dllm_var plot runs/quickstart --curves train/gradient_norm speed/tokens_per_second"""
PANELS = {  # what a picture shows of the curves that a run has, unless it is told which
    "loss": ("train/loss", "val/loss"),
    "masked accuracy": ("train/masked_accuracy", "val/masked_accuracy"),
    "perplexity bound": ("val/perplexity_bound",),
    "token error rate of sampled answers": ("sample/token_error_rate",),
    "sampled answers of the right length": ("sample/length_exact",),
    "tokens per second": ("speed/tokens_per_second",),
}
COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown", "tab:pink", "tab:gray")
SMOOTHED = 200  # points of a curve from which on its moving average is drawn, over a fiftieth of it
MEASURING = {"validate", "test", "predict"}  # commands whose folders below a run's have no curves
Curve = dict[int, float]  # values by their steps


def main(command: str, arguments: list[str]) -> int:
    """Runs `plot`; raises UserError for a folder without curves, and without matplotlib."""
    options = build_parser(command).parse_args(arguments)
    if not options.runs:
        raise UserError(f"{command} needs a run folder, such as runs/quickstart/version_0")
    if find_spec("matplotlib") is None:
        raise UserError(f'{command} needs matplotlib: pip install "dllm-var[plots]"')
    output = Path(options.output).expanduser()
    if output.suffix != ".png":
        raise UserError(f"--output must end in .png, got '{output}'")
    folders = [folder for run in options.runs for folder in run_folders(Path(run).expanduser())]
    folders = list(dict.fromkeys(folders))
    if len(folders) > len(COLOURS):
        raise UserError(f"{', '.join(options.runs)}: there are {len(folders)} runs; name at most {len(COLOURS)}")
    runs = dict(zip(names_of(folders), map(read_curves, folders), strict=True))
    figure = draw(runs, panels_of(runs, options.curves))
    with write_atomically(output) as partial:
        figure.savefig(partial, format="png", dpi=120)
    print(f"wrote {output}: {', '.join(runs)}")
    return 0


def build_parser(command: str) -> SettingsParser:
    parser = SettingsParser.of_command(command, "RUN [RUN ...] [options]", DESCRIPTION, EXAMPLES)
    runs = "a run's folder, or one with several runs below it"
    parser.add_argument("runs", nargs="*", type=str, metavar="RUN", help=runs)
    parser.add_argument("--output", type=str, default="curves.png", metavar="FILE.png", help="where to")
    curves = "what to draw in place of the usual curves, a panel each: train/loss, val/loss, ..."
    parser.add_argument("--curves", nargs="+", type=str, metavar="NAME", help=curves)
    return parser


def run_folders(place: Path) -> list[Path]:
    """Returns a folder that has curves, or those below it; raises UserError when there are none."""
    if not place.is_dir():
        raise UserError(f"there is no run folder '{place}'")
    files = [*place.rglob("events.out.tfevents.*"), *place.rglob("metrics.csv")]
    below = {file.parent for file in files if not MEASURING & {*file.parent.relative_to(place).parts}}
    folders = sorted(below, key=lambda one: (len(one.parts), one))
    if not folders:
        raise UserError(f"'{place}' has neither TensorBoard events nor a metrics.csv: give the folder of a run")
    return [place] if place in folders else folders


def names_of(folders: Sequence[Path]) -> list[str]:
    """Returns the paths of folders from the one above what they share: NAME/version_N."""
    whole = [folder.resolve() for folder in folders]
    shared = Path(os.path.commonpath(whole)).parent
    return [str(folder.relative_to(shared.parent if len(whole) == 1 else shared)) for folder in whole]


def read_curves(folder: Path) -> dict[str, Curve]:
    """Returns the scalars of a run by their names; of a step that was done again after a resume, the last value."""
    found: dict[str, Curve] = defaultdict(dict)
    if any(folder.glob("events.out.tfevents.*")):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # takes a second

        events = EventAccumulator(str(folder), size_guidance={"scalars": 0})  # 0: all of them
        events.Reload()
        for name in events.Tags()["scalars"]:
            found[name] = {event.step: event.value for event in events.Scalars(name)}
    else:
        try:
            with (folder / "metrics.csv").open(newline="", encoding="utf-8") as file:
                for row in csv.DictReader(file):
                    for name, cell in row.items():
                        if cell and name not in ("step", "epoch"):
                            found[name][int(row["step"])] = float(cell)
        except (KeyError, TypeError, ValueError):
            raise UserError(f"{folder / 'metrics.csv'} is not one that Lightning's CSVLogger has written") from None
    return {name: dict(sorted(curve.items())) for name, curve in found.items()}


def panels_of(runs: dict[str, dict[str, Curve]], names: Sequence[str] | None) -> dict[str, tuple[str, ...]]:
    """Returns the titles of a picture's panels and the curves in them; raises UserError when no run has any."""
    known = sorted({name for curves in runs.values() for name in curves})
    for name in names or []:
        if name not in known:
            raise UserError(f"--curves: no run has '{name}'{suggestion(name, known)}; there are {', '.join(known)}")
    wanted = PANELS if names is None else {name: (name,) for name in names}
    panels = {title: curves for title, curves in wanted.items() if set(curves) & set(known)}
    if not panels:
        raise UserError(f"{', '.join(runs)}: no curves yet; they come with trainer.log_every_n_steps")
    return panels


def draw(runs: dict[str, dict[str, Curve]], panels: dict[str, tuple[str, ...]]) -> Any:
    """Returns a matplotlib figure of runs: a panel for each title, a colour for each run."""
    from matplotlib.figure import Figure  # an optional extra

    columns = 2 if len(panels) == 4 else min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.2 * columns, 3 * rows + 0.5), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, (title, names) in zip(axes, panels.items(), strict=False):
        for (run, curves), colour in zip(runs.items(), COLOURS, strict=False):
            for name in names:
                if curve := curves.get(name):
                    _plot(axis, curve, colour, run, dots=not name.startswith(("train/", "speed/")))
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step", fontsize=9)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[len(panels) :]:
        axis.remove()
    axes[0].plot([], [], color="black", linewidth=0.8, label="training")
    axes[0].plot([], [], ".-", color="black", linewidth=1.6, label="validation and sampled answers")
    lines = {label: line for axis in figure.axes for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return figure


def _plot(axis: Any, curve: Curve, colour: str, label: str, dots: bool) -> None:
    """Draws a curve: with dots, or thin, and then as its moving average when it is long."""
    steps, values = np.array(list(curve)), np.array(list(curve.values()))
    if dots:
        axis.plot(steps, values, ".-", color=colour, linewidth=1.6, label=label)
        return
    width = len(values) // 50
    smooth = len(values) >= SMOOTHED
    axis.plot(steps, values, color=colour, linewidth=0.8, alpha=0.3 if smooth else 0.7, label=None if smooth else label)
    if smooth:
        means = np.convolve(values, np.ones(width) / width, "valid")
        axis.plot(steps[width - 1 :], means, color=colour, linewidth=1.1, label=label)
