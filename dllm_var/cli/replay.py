"""`replay`: computes the losses again that the loss guard has recorded."""

from __future__ import annotations

import tempfile
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

from dllm_var.errors import UserError
from dllm_var.settings import SettingsParser, dump_yaml, read_settings

DESCRIPTION = """Computes the losses again that the loss guard has recorded in a run's loss_guard.jsonl, row by row.

It goes on from the run's last checkpoint before the step, with the run's own settings, and ends at the step; nothing is
saved. With as many processes as the run had, the losses are the recorded ones."""


def main(command: str, arguments: list[str]) -> int:
    """Replays one record and returns the exit status.

    Args:
        command: Name to show.
        arguments: The run folder and options.

    Raises:
        UserError: When there is no record, no checkpoint before it, or no configuration.
    """
    parser = SettingsParser(prog=f"python -m dllm_var {command}", description=DESCRIPTION)
    parser.add_argument("run", help="run folder, such as runs/quickstart/version_0")
    parser.add_argument("--step", type=int, help="which record, by its step; the last when not given")
    parser.add_argument("--checkpoint", help="go on from this one, in place of the last before the step")
    parser.add_argument("--rows", type=int, default=8, help="how many rows are shown, the worst first (default: 8)")
    parser.add_argument("--trainer.devices", dest="devices", help="processes, when not as many as the run had")
    options = parser.parse_args(arguments)
    if options.rows < 1:
        raise UserError(f"--rows must be at least 1, got {options.rows}")
    run = Path(options.run)
    record = find_record(run, options.step)
    checkpoint = checkpoint_before(run, record["step"], options.checkpoint)
    config = run / "config.yaml"
    if not config.is_file():
        raise UserError(f"there is no {config}: the run folder of a fit has one")
    warnings.filterwarnings("ignore", message=".*callbacks used to create the checkpoint.*")  # most are left out
    with tempfile.TemporaryDirectory() as folder:
        overlay = Path(folder) / "replay.yaml"
        overlay.write_text(dump_yaml(replay_settings(read_settings(config), record, options.rows)), encoding="utf-8")
        settings = [f"--config={config}", f"--config={overlay}", f"--ckpt_path={checkpoint}"]
        settings += [f"--trainer.devices={options.devices}"] if options.devices is not None else []
        return import_module("dllm_var.cli.fit").main("fit", settings)


def find_record(run: Path, step: int | None) -> dict[str, Any]:
    """Returns the record of a step, or the last one.

    Raises:
        UserError: When there is none; names the steps there are.
    """
    from dllm_var.training.loss_guard import GUARD_FILE, read_records

    path = run / GUARD_FILE
    if not path.is_file():
        raise UserError(f"there is no {path}: no loss of this run was out of the ordinary")
    records = read_records(path)
    wanted = [record for record in records if step in (None, record["step"])]
    if not wanted:
        steps = ", ".join(str(record["step"]) for record in records)
        raise UserError(f"{path} has no step {step}; it has {steps}")
    return wanted[-1]


def checkpoint_before(run: Path, step: int, named: str | None) -> Path:
    """Returns the checkpoint with the most steps that does not have this one yet, of the run or the one that is named.

    Raises:
        UserError: When there is none.
    """
    from dllm_var.checkpoints.choose import newest_first

    paths = [Path(named)] if named else newest_first(run / "checkpoints")
    early = {steps: path for path in reversed(paths) if (steps := steps_of(path)) < step}
    if not early:
        where = f"{named} is not" if named else f"no checkpoint in {run / 'checkpoints'} is"
        raise UserError(f"{where} from before step {step}: keep more of them (save_top_k: -1), or name an earlier one")
    return early[max(early)]


def steps_of(path: Path) -> int:
    """Returns how many steps a checkpoint has been trained."""
    import torch

    from dllm_var.checkpoints.choose import is_sharded
    from dllm_var.checkpoints.run_files import unreadable
    from dllm_var.checkpoints.shards import read_trainer_state

    if is_sharded(path):
        return read_trainer_state(path)["global_step"]
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise UserError(f"{path} is not a checkpoint")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)["global_step"]
    except Exception as error:  # torch raises many kinds; `fit` will look at the checksum
        raise unreadable(path, error) from error


def replay_settings(config: dict[str, Any], record: dict[str, Any], rows: int) -> dict[str, Any]:
    """Returns what is different from the run: nothing is logged, saved, validated or sampled, and nothing stops it."""
    trainer = config.get("trainer")
    callbacks = trainer.get("callbacks") if isinstance(trainer, dict) else None
    kept = [callback for callback in callbacks if _changes_training(callback)] if isinstance(callbacks, list) else []
    shown = {"class_path": "dllm_var.callbacks.replay.ReplayStep", "init_args": {"record": record, "num_shown": rows}}
    return {
        "trainer": {
            "logger": False,
            "callbacks": [*kept, shown],
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "limit_val_batches": 0,
            "num_sanity_val_steps": 0,
        },
        "model": {"init_args": {"loss_guard": {"max_skipped": record["step"] + 1}}},
    }


def _changes_training(callback: Any) -> bool:
    """Whether a run without this callback would refuse the checkpoint: one that averages weights."""
    from lightning.pytorch.callbacks import WeightAveraging

    path = callback.get("class_path") if isinstance(callback, dict) else None
    module, _, name = str(path).rpartition(".")
    try:
        kind = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError):  # `fit` says what is wrong with it
        return False
    return isinstance(kind, type) and issubclass(kind, WeightAveraging)
