"""Small training runs that must come out the same however they are split; for test_splits.py, on two processes too."""

import math
import sys
from functools import partial
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger

from dllm_var import DiffusionLM
from dllm_var.callbacks import EmaWeights
from dllm_var.datamodules import PackedDataModule
from dllm_var.model import TransformerConfig
from dllm_var.objectives import Autoregressive, EosSchedule, Mdlm
from dllm_var.training.optim import Schedule

OBJECTIVES = {
    "eos": EosSchedule,
    "certain": partial(EosSchedule, certainty=1.0),
    "mdlm": Mdlm,
    "mdlm over samples": partial(Mdlm, mean_over="samples"),
    "autoregressive": Autoregressive,
}
GLOBAL_BATCH = 8
BAD_ROW = 13  # second step; with two processes of four rows each, the second one's


class Poisoned(EosSchedule):
    """The loss of one row is not a number."""

    def corrupt(self, batch, generator):
        noised = super().corrupt(batch, generator)
        bad = (batch["row"] == BAD_ROW)[:, None]
        noised.weights = torch.where(bad, math.nan, torch.ones_like(noised.mask_rate))
        return noised


class Watch(L.Callback):
    """The loss, its rows with theirs, and the weights after each step; those of the average in validation."""

    def __init__(self):
        self.losses, self.rows, self.weights, self.validated = [], [], [], []

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step > len(self.losses) + self.began:
            self.losses.append(pl_module.step.last.loss)
            self.rows.append(sorted(pl_module.step.last.rows()))
            self.weights.append(flat(pl_module))

    def on_train_start(self, trainer, pl_module):
        self.began = trainer.global_step

    def on_validation_batch_end(self, trainer, pl_module, *_):
        self.validated.append(flat(pl_module))


def flat(module):
    return torch.cat([parameter.detach().flatten().clone() for parameter in module.transformer.parameters()])


def fit(folder, devices=1, accumulate=1, objective=None, steps=2, checkpoint=None, callbacks=(), validate=0):
    """Trains on the same eight rows a step, whatever the split; plain SGD, so that weights show the gradients."""
    L.seed_everything(0, verbose=False)
    model = DiffusionLM(
        TransformerConfig(hidden_size=16, num_layers=1, num_heads=2),
        objective or EosSchedule(),
        optimizer=lambda params: torch.optim.SGD(params, lr=0.5),
        schedule=Schedule("constant", 0),
    )
    data = PackedDataModule(
        batch_size=GLOBAL_BATCH // devices // accumulate, context_length=48, packing="best_fit", canvas=4
    )
    watch = Watch()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        accumulate_grad_batches=accumulate,
        max_steps=steps,
        limit_val_batches=validate,
        val_check_interval=accumulate * steps if validate else None,
        num_sanity_val_steps=0,
        logger=CSVLogger(folder, name="run", version=0),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[watch, *callbacks],
    )
    trainer.fit(model, data, ckpt_path=checkpoint, weights_only=True)
    trainer.save_checkpoint(Path(folder) / "end.ckpt")
    result = {"losses": watch.losses, "rows": watch.rows, "weights": watch.weights, "validated": watch.validated}
    if trainer.is_global_zero:
        torch.save({**result, "final": flat(model)}, Path(folder) / "result.pt")
    return torch.load(Path(folder) / "result.pt", weights_only=True) if trainer.is_global_zero else None


def on_two_processes(folder, checkpoint):
    """All runs that need two processes, one after the other."""
    for name, objective in OBJECTIVES.items():
        for accumulate in (1, 2, 4):
            fit(folder / f"{name}{accumulate}", 2, accumulate, objective())
    fit(folder / "resumed", 2, steps=4, checkpoint=checkpoint)
    fit(folder / "poisoned", 2, objective=Poisoned(), steps=3)
    fit(folder / "averaged", 2, steps=3, callbacks=[EmaWeights(0.5)], validate=2)


if __name__ == "__main__":
    torch.set_num_threads(1)
    on_two_processes(Path(sys.argv[1]), Path(sys.argv[2]))
