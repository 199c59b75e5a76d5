"""The curves of runs as a picture: what is read of each, what is drawn, and what is refused in one line."""

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image

from dllm_var.__main__ import main
from dllm_var.cli import plot
from dllm_var.cli.plot import draw, names_of, panels_of, read_curves, run_folders


def write(logger: Any, steps: range, scale: float = 1.0) -> Path:
    """Writes two curves as a run does, the second at every other step; returns the run's folder."""
    for step in steps:
        logger.log_metrics({"train/loss": scale * step}, step)
        if step % 2:
            logger.log_metrics({"val/loss": scale * step + 0.5}, step)
    logger.save()
    logger.finalize("success")
    return Path(logger.log_dir)


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    loggers = [TensorBoardLogger(tmp_path, name="board"), CSVLogger(tmp_path, name="csv")]
    return [write(logger, range(1, 5)) for logger in loggers]


def test_tensorboard_events_and_csv_files_give_the_same_curves(runs: list[Path]) -> None:
    board, table = map(read_curves, runs)
    assert board == table == {"train/loss": {1: 1, 2: 2, 3: 3, 4: 4}, "val/loss": {1: 1.5, 3: 3.5}}


def test_a_step_that_a_resumed_run_does_again_counts_once(runs: list[Path]) -> None:
    write(TensorBoardLogger(runs[0].parents[1], name="board", version=0), range(3, 7), scale=10)
    assert read_curves(runs[0])["train/loss"] == {1: 1, 2: 2, 3: 30, 4: 40, 5: 50, 6: 60}


def test_draws_each_run_in_its_colour_and_only_panels_that_have_curves(runs: list[Path]) -> None:
    curves = dict(zip(names_of(runs), map(read_curves, runs), strict=True))
    figure = draw(curves, panels_of(curves, None))
    [axis] = figure.axes
    assert axis.get_title() == "loss"
    drawn = [(line.get_label(), line.get_color(), list(line.get_ydata())) for line in axis.get_lines()[:4]]
    assert [label for label, *_ in drawn] == [name for name in names_of(runs) for _ in range(2)]
    assert drawn[0][1] == drawn[1][1] != drawn[2][1] == drawn[3][1]
    assert [ys for *_, ys in drawn] == [[1, 2, 3, 4], [1.5, 3.5]] * 2
    chosen = draw(curves, panels_of(curves, ["val/loss", "train/loss"]))
    assert [axis.get_title() for axis in chosen.axes] == ["val/loss", "train/loss"]


def test_a_long_training_curve_is_drawn_with_its_moving_average() -> None:
    curve = {step: float(step % 2) for step in range(1000)}
    [axis] = draw({"run": {"train/loss": curve}}, {"loss": ("train/loss",)}).axes
    noisy, mean = (line.get_ydata() for line in axis.get_lines()[:2])
    assert max(noisy) == 1 and max(mean) == min(mean) == pytest.approx(0.5)


def test_the_command_draws_every_run_below_a_folder(runs: list[Path], tmp_path: Path, capsys: Any) -> None:
    write(CSVLogger(tmp_path, name="csv/validate"), range(1, 2))
    output = tmp_path / "new" / "curves.png"
    assert main(["plot", str(tmp_path), "--output", str(output)]) == 0
    names = [f"{tmp_path.name}/{logger}/version_0" for logger in ("board", "csv")]
    assert capsys.readouterr().out == f"wrote {output}: {', '.join(names)}\n"
    assert Image.open(output).format == "PNG"
    assert run_folders(tmp_path) == runs


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "plot needs a run folder"),
        (["nowhere"], "there is no run folder 'nowhere'"),
        (["empty"], "'empty' has neither TensorBoard events nor a metrics.csv"),
        (["foreign"], "foreign/metrics.csv is not one that Lightning's CSVLogger has written"),
        (["board", "--output", "curves.pdf"], "--output must end in .png"),
        (["board", "--curves", "train/los"], "no run has 'train/los'; did you mean 'train/loss'?"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], message: str, runs: list[Path], tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("foreign").mkdir()
    Path("foreign/metrics.csv").write_text("day,sales\nMonday,3\n")
    assert main(["plot", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_more_runs_than_colours_and_a_missing_matplotlib_are_one_line(
    tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    for number in range(9):
        folder = tmp_path / "many" / f"version_{number}"
        folder.mkdir(parents=True)
        (folder / "metrics.csv").write_text("epoch,step,train/loss\n0,1,2.0\n")
    assert main(["plot", str(tmp_path)]) == 2
    assert "there are 9 runs" in capsys.readouterr().err
    monkeypatch.setattr(plot, "find_spec", lambda name: None)
    assert main(["plot", str(tmp_path)]) == 2
    assert 'pip install "dllm-var[plots]"' in capsys.readouterr().err
