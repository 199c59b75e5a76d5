"""Training that starts from a published model: its shape, its weights, one at a time, and a row for the mask."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from byte_tokenizer import write_byte_tokenizer
from published import transformers_model
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from dllm_var import DiffusionLM
from dllm_var.checkpoints.export import save_checkpoint_folder
from dllm_var.checkpoints.pretrained import load_checkpoint, load_pretrained
from dllm_var.checkpoints.starting_from import start_from, starting_config
from dllm_var.datamodules import JsonlSource, PackedDataModule
from dllm_var.errors import UserError
from dllm_var.model import Transformer, TransformerConfig
from dllm_var.model.sharding import shard
from dllm_var.objectives import Autoregressive, BlockDiffusion
from dllm_var.settings import SettingsParser
from dllm_var.text.tokenizer import Tokenizer
from dllm_var.training.optim import Schedule


def write_model(folder, rows, shards="100MB", shape=None, **tokens):
    """A published folder with tokenizer, whose vocabulary of 261 ids is of `rows` rows in the model."""
    model = transformers_model("Qwen2", vocab_size=rows, eos_token_id=260, **(shape or {}))
    model.save_pretrained(folder, max_shard_size=shards)
    write_byte_tokenizer(folder, **tokens)
    return model


def run(tmp_path, **settings):
    lines = [json.dumps({"prompt": f"{n}+1=", "response": str(n + 1)}) for n in range(64)]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    data = PackedDataModule(
        JsonlSource(str(tmp_path / "data.jsonl")),
        settings.pop("tokenizer"),
        batch_size=4,
        context_length=32,
        packing="best_fit",
    )
    model = DiffusionLM(
        optimizer=lambda params: torch.optim.SGD(params, lr=settings.pop("lr", 0.0)),
        schedule=Schedule("constant", 0),
        **settings,
    )
    quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False)
    trainer = L.Trainer(accelerator="cpu", max_steps=1, limit_val_batches=0, default_root_dir=tmp_path, **quiet)
    trainer.fit(model, data)
    return model


def test_a_run_takes_shape_and_weights_and_adds_a_row_for_the_mask(tmp_path):
    theirs = write_model(tmp_path / "hub", rows=261, mask_token="<|new mask|>")
    model = run(tmp_path, tokenizer=str(tmp_path / "hub"), init_from=str(tmp_path / "hub"))
    config = model.transformer.config
    assert (config.num_layers, config.qkv_bias, config.vocab_size, config.mask_id) == (2, True, 262, 261)
    assert not config.causal and config.terminator_ids == [260]
    assert config.context_length == theirs.config.max_position_embeddings
    embedding, head = model.transformer.embedding.weight, model.transformer.lm_head.weight
    assert torch.equal(embedding[:261], theirs.get_input_embeddings().weight) and torch.equal(
        head[:261], theirs.lm_head.weight
    )
    torch.testing.assert_close(embedding[261], theirs.get_input_embeddings().weight.mean(0))
    with torch.no_grad():
        ids = torch.arange(40)[None]
        theirs.config.is_causal = False
        torch.testing.assert_close(model.transformer(ids)[..., :261], theirs(ids).logits, atol=1e-5, rtol=1e-5)


def test_a_block_causal_model_is_remembered_and_no_other_objective_takes_it_in_silence(tmp_path, recwarn):
    write_model(tmp_path / "hub", rows=261, mask_token="<|new mask|>")
    blocks = BlockDiffusion(8, block_causal=True)
    model = run(tmp_path, tokenizer=str(tmp_path / "hub"), init_from=str(tmp_path / "hub"), objective=blocks)
    assert (model.config.grid, model.transformer.config.grid, model.config.causal) == (8, 8, False)
    again = save_checkpoint_folder(tmp_path / "again", model.transformer, model.tokenizer)
    assert load_pretrained(again).config.grid == 8

    settings = dict(tokenizer=str(again), init_from=str(again))
    run(tmp_path, objective=BlockDiffusion(8, block_causal=True), **settings)
    assert not [each for each in recwarn if "reads text in blocks" in str(each.message)]
    with pytest.warns(UserWarning, match="reads text in blocks of 8 tokens, and is trained to read otherwise"):
        model = run(tmp_path, objective=BlockDiffusion(8), **settings)
    assert model.transformer.config.grid is None


def test_spare_rows_need_no_new_row(tmp_path):
    write_model(tmp_path / "hub", rows=300, mask_token="<|new mask|>")
    model = run(tmp_path, tokenizer=str(tmp_path / "hub"), init_from=str(tmp_path / "hub"), objective=Autoregressive())
    assert (model.config.vocab_size, model.config.mask_id, model.config.causal) == (300, 261, True)


def test_a_decoder_gets_the_mask_too_and_keeps_reading_left_to_right(tmp_path):
    theirs = write_model(tmp_path, rows=261, mask_token=None)
    model, tokenizer, meta = load_checkpoint(tmp_path)
    assert (model.config.causal, tokenizer.mask_id, model.config.vocab_size, meta) == (True, 257, 261, {})
    with torch.no_grad():
        ids = torch.arange(40)[None]
        torch.testing.assert_close(model(ids), theirs(ids).logits, atol=1e-5, rtol=1e-5)


def test_what_is_set_wins_also_at_its_default_and_what_is_left_out_comes_from_the_checkpoint(tmp_path):
    model = Transformer(
        TransformerConfig(hidden_size=32, num_layers=1, num_heads=2, vocab_size=261, rope_scaling=4.0, rope_theta=2e4)
    )
    write_byte_tokenizer(tmp_path)
    save_checkpoint_folder(tmp_path, model, Tokenizer.from_pretrained(tmp_path))
    kept = starting_config(TransformerConfig(), tmp_path)
    assert (kept.rope_scaling, kept.rope_theta, kept.hidden_size) == (4.0, 2e4, 32)
    undone = starting_config(TransformerConfig(rope_scaling=1.0), tmp_path)
    assert (undone.rope_scaling, undone.rope_theta, undone.hidden_size) == (1.0, 2e4, 32)
    for name, default in (("hidden_size", 256), ("num_layers", 4)):
        with pytest.raises(UserError, match=f"transformer.{name}=.*, the settings say {default}"):
            starting_config(TransformerConfig(**{name: default}), tmp_path)
    for given, expected in (
        ([], 4.0),
        (["--model.transformer.rope_scaling=1.0"], 1.0),
        (["--model.transformer=null"], 4.0),
    ):
        parser = SettingsParser()
        parser.add_class_arguments(DiffusionLM, "model")
        settings = parser.parse_args([f"--model.init_from={tmp_path}", *given])
        recorded = parser.parse_string(parser.dump(settings))  # what a run records of its settings says the same
        assert parser.instantiate(recorded).model.config.rope_scaling == expected


def test_another_tokenizer_is_refused(tmp_path):
    write_model(tmp_path / "hub", rows=261)
    other = tmp_path / "other"
    shutil.copytree(tmp_path / "hub", other)
    values = json.loads((other / "tokenizer.json").read_text())
    vocabulary = values["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match="another tokenizer"):
        run(tmp_path, tokenizer=str(other), init_from=str(tmp_path / "hub"))


def test_weights_are_read_from_all_shards(tmp_path):
    theirs = write_model(tmp_path, rows=261, shards="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    ids = torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(load_pretrained(tmp_path, True)(ids), theirs(ids).logits, atol=1e-5, rtol=1e-5)
    index = tmp_path / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    name, file = next(iter(values["weight_map"].items()))
    for wrong, says in (
        ("../" + file, "a file beside it"),
        ("model-9.safetensors", "No such file"),
        (3, "weight_map"),
    ):
        index.write_text(json.dumps({"weight_map": {**values["weight_map"], name: wrong}}))
        with pytest.raises(UserError, match=says):
            load_pretrained(tmp_path)
    index.write_text(json.dumps({"weight_map": {n: f for n, f in values["weight_map"].items() if f != file}}))
    with pytest.raises(UserError, match=r"lacks \d+ weights of its config"):
        load_pretrained(tmp_path)


def test_weights_go_into_sharded_parameters(tmp_path):
    write_model(tmp_path, rows=261, mask_token="<|new mask|>")
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    settings = starting_config(TransformerConfig(), tmp_path)
    settings.vocab_size, settings.causal = 262, False
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        with torch.device("meta"):
            model = Transformer(settings)
        shard(model, init_device_mesh("cpu", (1,)))
        model.to_empty(device="cpu")
        start_from(model, tokenizer, tmp_path)
        whole, _, _ = load_checkpoint(tmp_path)
        for (name, ours), expected in zip(model.named_parameters(), whole.parameters(), strict=True):
            assert isinstance(ours, DTensor) and torch.equal(ours.full_tensor(), expected), name
    finally:
        distributed.destroy_process_group()


SCRIPT = """
import sys
import threading
import torch
import lightning as L
from lightning.pytorch.strategies import ModelParallelStrategy
from dllm_var import DiffusionLM
from dllm_var.datamodules import JsonlSource, PackedDataModule
from dllm_var.training.optim import Schedule

folder, data, path, devices = sys.argv[1:]
torch.set_num_threads(1)


class Peak(L.Callback):
    '''Most memory of its own that the process has from the model's building to the first step.'''

    def now(self):
        with open("/proc/self/status") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

    def setup(self, *_, **__):
        self.before = self.most = self.now()
        self.over = threading.Event()
        threading.Thread(target=self.watch, daemon=True).start()

    def watch(self):
        while not self.over.wait(0.002):
            self.most = max(self.most, self.now())

    def on_fit_start(self, *_):
        self.over.set()
        with open(f"peak-{trainer.global_rank}", "w") as file:
            file.write(str(self.most - self.before))


still = lambda params: torch.optim.SGD(params, lr=0.0)
model = DiffusionLM(optimizer=still, schedule=Schedule("constant", 0), init_from=folder)
strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1) if devices == "2" else "auto"
trainer = L.Trainer(
    strategy=strategy, devices=int(devices), accelerator="cpu", max_steps=1, limit_val_batches=0, callbacks=[Peak()],
    logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
)
trainer.fit(model, PackedDataModule(JsonlSource(data), folder, batch_size=2, context_length=32, packing="best_fit"))
if path:
    weights = {name: value.full_tensor().detach().clone() for name, value in model.transformer.named_parameters()}
    if trainer.is_global_zero:
        torch.save(weights, path)
"""


def run_apart(folder, devices, weights=""):
    """Trains a step from `hub` in processes of their own; returns the most memory that each took to begin."""
    lines = [json.dumps({"prompt": f"{n}+1=", "response": str(n + 1)}) for n in range(64)]
    (folder / "data.jsonl").write_text("\n".join(lines))
    (folder / "train.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "train.py", "hub", "data.jsonl", weights, str(devices)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join((str(Path(__file__).parents[2]), *sys.path))},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [int(file.read_text()) for file in folder.glob("peak-*")]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
@pytest.mark.parametrize("devices", [1, 2])
def test_a_model_is_in_memory_once_or_as_much_of_it_as_the_process_trains(devices, tmp_path):
    """Measured, on 300 MB of weights in three files; what is mapped from files is not the process's own."""
    shape = dict(hidden_size=512, intermediate_size=1536, num_hidden_layers=24)
    write_model(tmp_path / "hub", rows=261, shape=shape, mask_token="<|new mask|>")
    files = list((tmp_path / "hub").glob("*.safetensors"))
    size = sum(file.stat().st_size for file in files)
    assert len(files) >= 3 and size > 280e6
    peaks = run_apart(tmp_path, devices, "weights.pt" if devices == 2 else "")
    assert len(peaks) == devices
    assert all(0.9 * size / devices < peak < 1.3 * size / devices for peak in peaks), [peak / size for peak in peaks]
    if devices == 2:
        expected, _, _ = load_checkpoint(tmp_path / "hub")
        found = torch.load(tmp_path / "weights.pt", weights_only=True)
        assert found.keys() == dict(expected.named_parameters()).keys()
        assert all(torch.equal(found[name], value) for name, value in expected.named_parameters())
