"""Folders and Lightning files: a lossless round trip, and what is wrong with a bad one is named."""

import json
import math
import os
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from dllm_var.checkpoints.export import save_checkpoint_folder
from dllm_var.checkpoints.pretrained import load_checkpoint, load_pretrained, locate_checkpoint
from dllm_var.checkpoints.run_checkpoint import identity
from dllm_var.checkpoints.starting_from import starting_config
from dllm_var.datamodules import CmudictSource
from dllm_var.errors import UserError
from dllm_var.model import Transformer, TransformerConfig
from dllm_var.text.tokenizer import Tokenizer

FILES = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]


@pytest.fixture
def tokenizer():
    return Tokenizer.from_pretrained(CmudictSource.default_tokenizer)


def small(tokenizer, **changes):
    config = TransformerConfig(
        hidden_size=16,
        num_layers=2,
        num_heads=2,
        vocab_size=tokenizer.vocab_size,
        mask_id=tokenizer.mask_id,
        terminator_ids=list(tokenizer.terminator_ids),
        pad_id=tokenizer.pad_id,
    )
    for name, value in changes.items():
        setattr(config, name, value)
    return Transformer(config).eval()


@pytest.fixture
def folder(tmp_path, tokenizer):
    return save_checkpoint_folder(tmp_path / "model", small(tokenizer), tokenizer)


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": True}, {"causal": True, "qkv_bias": True, "qk_norm": True}])
def test_round_trip_is_lossless(changes, tmp_path, tokenizer):
    model = small(tokenizer, **changes)
    meta = {"sampler": None, "step": 7}
    save_checkpoint_folder(tmp_path, model, tokenizer, meta)
    again, its_tokenizer, its_meta = load_checkpoint(tmp_path)
    tokens = torch.randint(0, tokenizer.vocab_size, (2, 9))
    assert torch.equal(model(tokens), again(tokens))
    assert again.config == model.config and its_meta == meta
    assert its_tokenizer.fingerprint == tokenizer.fingerprint


def test_all_files_of_a_folder_may_be_read_by_the_same_people(folder):
    """safetensors 0.8 keeps what it writes to its owner; a server may run as somebody else."""
    plain = folder / "plain"
    plain.touch()
    assert {file.stat().st_mode for file in folder.iterdir()} == {plain.stat().st_mode}


def test_a_bare_model_gives_logits_and_can_be_read_causally(folder):
    tokens = torch.tensor([[5, 6, 7]])
    changed = torch.tensor([[5, 6, 8]])
    assert load_pretrained(folder)(tokens).shape == (1, 3, load_pretrained(folder).config.vocab_size)
    causal = load_pretrained(folder, causal=True)
    assert torch.equal(causal(tokens)[:, :2], causal(changed)[:, :2])


def test_a_run_means_its_export_unless_a_checkpoint_goes_beyond_it(tmp_path, tokenizer):
    last = tmp_path / "checkpoints" / "last.ckpt"
    last.parent.mkdir()
    torch.save({"global_step": 4}, last)
    assert locate_checkpoint(tmp_path) == last
    export = save_checkpoint_folder(tmp_path / "model", small(tokenizer), tokenizer, {"step": 4})
    assert sorted(path.name for path in export.iterdir() if "." in path.name) == FILES
    for step, age, meant in ((4, 10, export), (6, 10, last), (6, -10, last), (None, -10, export), (None, 10, last)):
        torch.save({"global_step": step}, last)
        changed = (export / "config.json").stat().st_mtime + age
        os.utime(last, (changed, changed))
        assert locate_checkpoint(tmp_path) == meant, (step, age)


def truncate(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def change_config(**changes):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        for name, value in changes.items():
            (config if name in config else config["dllm_var"]["transformer"])[name] = value
        (folder / "config.json").write_text(json.dumps(config))

    return change


def change_weight(name, change):
    def damage(folder):
        weights = load_file(folder / "model.safetensors")
        changed = change(weights[name])
        save_file({**weights, name: changed}, folder / "model.safetensors")

    return damage


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (truncate, "model.safetensors"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json"),
        (change_config(colour="red"), "colour"),
        (change_config(vocab_size=99), "shape"),
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors"),
        (change_weight("model.norm.weight", lambda weight: weight.fill_(torch.nan)), "norm.weight .*NaN or infinite"),
        (change_weight("lm_head.weight", lambda weight: weight.sub_(torch.inf)), "lm_head.*NaN or infinite"),
        (change_weight("lm_head.weight", lambda weight: weight.to(torch.int64)), "type torch.int64"),
        (change_weight("model.norm.weight", lambda weight: weight.to(torch.int8)), "type torch.int8"),
        (change_config(mask_id=2), "mask_id=2 in its config, and its tokenizer says 1"),
        (change_config(terminator_ids=[3]), r"terminator_ids=\[3\]"),
        (change_config(mask_id=999), "id 999, outside the vocabulary"),
    ],
)
def test_damage_is_named(damage, named, folder):
    damage(folder)
    with pytest.raises(UserError, match=named):
        load_checkpoint(folder)


SIZES_WITHOUT_SENSE = [
    ("hidden_size", "16", "where int is expected"),
    ("hidden_size", 10**400, "do not belong together"),
    ("num_layers", True, "where int is expected"),
    ("num_layers", math.nan, "num_layers=nan"),
    ("num_layers", 10**9, "num_layers=1000000000, and beside it are 21 tensors"),
    ("intermediate_size", 10**5, "do not belong together"),
    ("vocab_size", 0, "at least 1"),
    ("norm_eps", math.nan, "norm_eps=nan"),
    ("rope_llama3", {"factor": "x"}, "rope_llama3"),
    ("causal", 1, "where bool is expected"),
]


@pytest.mark.parametrize(("name", "value", "message"), SIZES_WITHOUT_SENSE)
def test_settings_are_checked_before_anything_of_their_size_is_made(name, value, message, tmp_path, tokenizer):
    model = small(tokenizer)
    folder = save_checkpoint_folder(tmp_path / "model", model, tokenizer)
    change_config(**{name: value})(folder)
    ours = identity(model.config, tokenizer, None, None)
    state = {f"transformer.{key}": weight for key, weight in model.state_dict().items()}
    ours["transformer"][name] = value
    torch.save({"state_dict": state, "dllm_var": ours}, tmp_path / "lone.ckpt")
    for place in (folder, tmp_path / "lone.ckpt"):
        began = time.monotonic()
        with pytest.raises(UserError, match=message):
            load_checkpoint(place)
        with pytest.raises(UserError, match=message):
            starting_config(TransformerConfig(), place)
        assert time.monotonic() - began < 5


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None])
def test_a_file_that_is_no_checkpoint_is_named(content, tmp_path):
    path = tmp_path / "x.ckpt"
    path.write_bytes(content) if content is not None else torch.save({"state_dict": {}}, path)
    with pytest.raises(UserError, match=r"x\.ckpt"):
        load_checkpoint(path)


def test_pickled_code_is_never_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return (exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",))

    torch.save({"state_dict": {}, "dllm_var": Trap()}, tmp_path / "x.ckpt")
    with pytest.raises(UserError, match=r"x\.ckpt"):
        load_checkpoint(tmp_path / "x.ckpt")
    assert not (tmp_path / "ran").exists()


def test_nothing_there_is_named(tmp_path):
    with pytest.raises(UserError, match="no checkpoint at"):
        load_checkpoint(tmp_path / "none")
    with pytest.raises(UserError, match="no checkpoint in"):
        load_checkpoint(tmp_path)
