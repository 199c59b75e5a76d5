"""Overlays of configs/strategy on every recipe, and the same rows giving the same training however they are spread."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from dllm_var.__main__ import main
from dllm_var.checkpoints.pretrained import load_checkpoint
from dllm_var.datamodules import CmudictSource, PackedDataModule
from dllm_var.metrics import AnswerMetrics
from dllm_var.sampling.base import sampler_from_config

ROOT = Path(__file__).parent.parent.parent
CONFIGS = ROOT / "configs"
STRATEGIES = ["context_parallel", "ddp", "deepspeed_zero2", "fsdp", "fsdp2", "tensor_parallel"]
PLACES = {"trainer.strategy", "trainer.accelerator", "trainer.devices"}
FLAT = {"fsdp", "deepspeed_zero2"}  # they keep parameters flat, which Muon cannot use


def settings(capsys, *configs):
    """Gives the resolved settings as {dotted name: value}, a strategy as one value."""
    paths = [argument for name in configs for argument in ("--config", str(CONFIGS / f"{name}.yaml"))]
    assert main(["fit", *paths, "--print_config"]) == 0
    return dict(flat(yaml.safe_load(capsys.readouterr().out)))


def flat(values, place=""):
    if isinstance(values, dict) and place != "trainer.strategy":
        for name, value in values.items():
            yield from flat(value, f"{place}.{name}" if place else name)
    else:
        yield place, values


@pytest.mark.slow
def test_a_strategy_on_a_recipe_changes_where_it_runs_and_nothing_else(capsys):
    recipe = "quickstart"
    alone = settings(capsys, recipe)
    for strategy in STRATEGIES:
        with_it = settings(capsys, recipe, f"strategy/{strategy}")
        changed = {name for name in alone.keys() | with_it.keys() if alone.get(name) != with_it.get(name)}
        assert changed - PLACES == {name for name in changed if name.startswith("model.init_args.optimizer")}
        if strategy in FLAT:
            assert with_it["model.init_args.optimizer.class_path"].endswith("AdamW")
        else:
            assert changed <= PLACES
        wanted = with_it["trainer.strategy"]
        wanted = wanted if isinstance(wanted, str) else wanted["class_path"].rsplit(".", 1)[-1]
        assert wanted.lower().removesuffix("strategy").startswith(strategy.partition("_")[0])


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without CUDA")
@pytest.mark.parametrize(("strategy", "needs"), [("fsdp", "a CUDA device"), ("deepspeed_zero2", "deepspeed")])
def test_a_strategy_that_cannot_run_says_in_one_line_what_it_needs(strategy, needs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(CmudictSource, "__init__", no_data)
    configs = ["--config", str(CONFIGS / "quickstart.yaml"), "--config", str(CONFIGS / f"strategy/{strategy}.yaml")]
    assert main(["fit", *configs]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: trainer.strategy") and needs in line and "fsdp2.yaml" in line
    assert not list(tmp_path.iterdir())


def no_data(self):
    raise AssertionError("data was touched before the strategy was known to work")


TOY = """
model:
  transformer: {hidden_size: 16, num_layers: 2, num_heads: 2}
  schedule: {kind: constant, warmup_steps: 0}
data: {context_length: 48}
sampler: {init_args: {max_new_tokens: 6}}
trainer:
  max_steps: 3
  limit_val_batches: 2
  val_check_interval: 3
  log_every_n_steps: 1
  callbacks:
    - dllm_var.callbacks.SpeedMonitor
    - class_path: dllm_var.callbacks.SamplingCallback
      init_args: {sampler: "${sampler}", num_examples: 8, every_n_steps: 3}
    - dllm_var.callbacks.ExportWeights
    - class_path: dllm_var.callbacks.RunSummary
      init_args: {sampler: "${sampler}", num_examples: 21}
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {every_n_train_steps: 2, save_last: true}
"""


def train(folder, *arguments, command=("-m", "dllm_var", "fit"), **environment):
    """Runs the quickstart at toy size in processes of its own; gives its output and its run folder."""
    folder.mkdir(exist_ok=True)
    (folder / "toy.yaml").write_text(TOY)
    configs = ["--config", str(CONFIGS / "quickstart.yaml"), "--config", "toy.yaml"]
    start = [sys.executable, *command] if command[0] == "-m" else [*command]
    path = os.pathsep.join([str(Path(sys.executable).parent), environment.pop("PATH", ""), os.environ["PATH"]])
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": path, **environment}
    run = subprocess.run(
        [*start, *configs, *arguments], env=environment, capture_output=True, text=True, timeout=900, cwd=folder
    )
    assert run.returncode == 0, run.stderr[-3000:]
    [version] = (folder / "runs" / "quickstart").iterdir()
    return run.stdout, version


def losses(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run)).Reload()
    return [event.value for event in events.Scalars("train/loss")]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return train(tmp_path_factory.mktemp("alone") / "run", "--data.batch_size=8")[1]


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "batch_size"), [("torchrun", 4), ("fsdp2", 4), ("tensor_parallel", 8)])
def test_two_processes_train_as_one_and_report_once(strategy, batch_size, alone, at_the_root):
    """With Muon, clipping, sampling, export and summary, as the recipe has them; the script torchrun.sh takes ddp."""
    rows = f"--data.batch_size={batch_size}"
    if strategy == "torchrun":
        script = ["bash", str(ROOT / "docs/multi_node/torchrun.sh")]
        shown, run = train(at_the_root, rows, command=script, PROCESSES="2", PORT=free_port())
    else:
        overlay = ["--config", str(CONFIGS / f"strategy/{strategy}.yaml"), "--trainer.devices=2"]
        shown, run = train(at_the_root, *overlay, rows)
    assert losses(run) == pytest.approx(losses(alone), rel=1e-5)
    one, two = load_file(alone / "model/model.safetensors"), load_file(run / "model/model.safetensors")
    assert one.keys() == two.keys()
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, atol=1e-4, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")
    assert shown.count("step 3, 8 answers") == shown.count("test split  ") == 1
    summary = json.loads((run / "summary.json").read_text())
    scores = scored_alone(run)
    assert summary["answers"] == scores["answers"] == 21  # an odd number: one process has one more
    assert summary["tokens"] == scores["tokens"]
    assert summary["token_error_rate"] == pytest.approx(scores["token_error_rate"])


def scored_alone(run):
    """Decodes what the summary did, with the exported weights, in this process."""
    transformer, tokenizer, meta = load_checkpoint(run)
    examples = PackedDataModule(context_length=48).held_out("test", 21)
    sampler = sampler_from_config(meta["sampler"])
    answers = sampler.generate(transformer, [example.prompt_ids for example in examples], tokenizer=tokenizer)
    metrics = AnswerMetrics()
    metrics.update(answers, [[list(r) for r in example.references] for example in examples])
    return metrics.compute()


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return str(probe.getsockname()[1])


SRUN = """#!/bin/bash
# Starts the tasks of a job on this machine, each told by SLURM's variables which one it is.
pids=()
for task in $(seq 0 $((SLURM_NTASKS - 1))); do
  SLURM_PROCID=$task SLURM_LOCALID=$task SLURM_NODEID=0 "$@" & pids+=($!)
done
status=0
for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
exit $status
"""


@pytest.fixture
def at_the_root(tmp_path):
    """A folder to run the scripts in, which name configs/ as seen from the checkout."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "configs").symlink_to(CONFIGS)
    return tmp_path / "run"


@pytest.mark.slow
def test_the_slurm_script_trains_on_two_tasks_and_goes_on_when_it_is_requeued(alone, at_the_root):
    srun = at_the_root / "bin" / "srun"
    srun.parent.mkdir()
    srun.write_text(SRUN)
    srun.chmod(0o755)
    job = dict(SLURM_JOB_ID="17", SLURM_JOB_NAME="dllm-var", SLURM_NODELIST="localhost", SLURM_JOB_NUM_NODES="1")
    job |= dict(SLURM_NTASKS="2", SLURM_NTASKS_PER_NODE="2", STRATEGY="fsdp2", PATH=str(srun.parent))
    script = ["bash", str(ROOT / "docs/multi_node/slurm.sbatch")]
    arguments = ["--data.batch_size=4"]
    _, run = train(at_the_root, *arguments, "--trainer.max_steps=2", command=script, **job)
    assert run.name == "job_17"
    _, again = train(at_the_root, *arguments, command=script, SLURM_RESTART_COUNT="1", **job)
    assert again == run
    assert losses(run)[-1] == pytest.approx(losses(alone)[-1], rel=1e-5)
    assert json.loads((run / "summary.json").read_text())["steps"] == 3
