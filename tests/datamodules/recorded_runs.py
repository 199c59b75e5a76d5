"""A source made of lists, and a model that keeps which rows it was trained on."""

import json

import lightning.pytorch as L
import torch

from dllm_var.datamodules import CmudictSource, Source


class ListSource(Source):
    """Records from a list; all of them training."""

    default_tokenizer = CmudictSource.default_tokenizer

    def __init__(self, records, **splits):
        self.by_split = {"train": records, **splits}
        self.splits = tuple(self.by_split)

    def records(self, split):
        return iter(self.by_split[split])

    def fingerprint(self):
        return json.dumps(self.by_split)


class Recorder(L.LightningModule):
    """Keeps the rows of each step over all ranks, and the tokens of training."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen = {"train": [], "validation": [], "test": []}
        self.tokens = []

    def training_step(self, batch, index):
        assert set(batch) == {"input_ids", "supervised", "segment_ids", "position_ids", "row"}
        self.tokens.append(batch["input_ids"].tolist())
        return self.record("train", batch)

    def validation_step(self, batch, index):
        self.record("validation", batch)

    def test_step(self, batch, index):
        self.record("test", batch)

    def record(self, split, batch):
        self.seen[split].append(self.all_gather(batch["row"]).flatten().tolist())
        return self.weight.sum() * batch["supervised"].sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def make_trainer(folder, **arguments):
    quiet = ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing")
    return L.Trainer(default_root_dir=folder, accelerator="cpu", **dict.fromkeys(quiet, False), **arguments)
