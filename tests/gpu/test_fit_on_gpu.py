"""Short fits on one GPU: every precision, strategy and option trains as the plain run does."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import FSDPStrategy

from dllm_var.callbacks import EmaWeights
from dllm_var.checkpoints.pretrained import load_checkpoint
from dllm_var.model import TransformerConfig
from dllm_var.model.float8 import Float8
from dllm_var.model.lora import Lora, is_adapter, plain_name
from dllm_var.model.transformer import Layer
from dllm_var.training.strategies import FSDP2

ROOT = Path(__file__).parents[2]
TOLERANCE = {"32-true": 1e-3, "bf16-mixed": 0.02, "bf16-true": 0.05, "16-mixed": 0.02}


@pytest.fixture
def plain(fit: Any) -> list[float]:
    """Losses of the same run on the CPU in float32."""
    return fit(on=torch.device("cpu"))[2]


def test_precisions_train_as_the_cpu_does_in_float32(fit: Any, plain: list[float], device: torch.device) -> None:
    assert plain[-1] < plain[0]
    for precision, tolerance in TOLERANCE.items():
        if (device.type, precision) != ("cpu", "16-mixed"):  # which Lightning refuses there
            assert fit(precision=precision)[2] == pytest.approx(plain, rel=tolerance), precision


def test_documents_are_those_of_flex_attention_in_16_bits(fit: Any, monkeypatch: Any) -> None:
    """torch's varlen kernel, with grouped queries and documents counted on the host, against a block mask."""
    kernel = fit(precision="bf16-mixed")[2]
    monkeypatch.setattr("dllm_var.model.attention.has_varlen", lambda *_: False)
    assert kernel == pytest.approx(fit(precision="bf16-mixed")[2], rel=0.01)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "fsdp"])
def test_strategies_train_as_one_device_and_their_checkpoint_opens(
    strategy: str, fit: Any, plain: list[float], device: torch.device, tmp_path: Path, request: Any
) -> None:
    if strategy == "fsdp":
        request.getfixturevalue("cuda")
    strategies = {
        "ddp": lambda: "ddp",
        "fsdp2": FSDP2,
        "fsdp": lambda: FSDPStrategy(auto_wrap_policy={Layer}, state_dict_type="full"),
    }
    saved = ModelCheckpoint(tmp_path / "saved", save_last=True, save_top_k=0, every_n_train_steps=4)
    settings = dict(callbacks=(saved,), enable_checkpointing=True)
    _, module, losses = fit(strategy=strategies[strategy](), **settings)
    assert losses == pytest.approx(plain, rel=2e-3)
    transformer, _, _ = load_checkpoint(tmp_path / "saved" / "last.ckpt")
    if strategy == "ddp":
        for stored, trained in zip(transformer.parameters(), module.transformer.parameters(), strict=True):
            assert torch.equal(stored, trained.cpu())
    assert all(weight.isfinite().all() for weight in transformer.parameters())


@pytest.mark.parametrize("options", [dict(compile=True), dict(activation_checkpointing="selective")])
def test_compiled_and_recomputing_runs_train_as_the_eager_one(options: dict[str, Any], fit: Any) -> None:
    eager = fit(precision="bf16-mixed")[2]
    assert fit(options, precision="bf16-mixed")[2] == pytest.approx(eager, rel=0.02)


def test_float8_trains_near_16_bits(fit: Any, device: torch.device) -> None:
    pytest.importorskip("torchao")
    float8 = dict(float8=Float8(emulate=device.type == "cpu"), compile=device.type == "cuda")
    eager = fit(precision="bf16-mixed")[2]
    assert fit(float8, precision="bf16-mixed")[2] == pytest.approx(eager, rel=0.1)


def test_adapters_are_trained_and_nothing_else(fit: Any) -> None:
    pytest.importorskip("peft")
    base = str(ROOT / "checkpoints" / "cmudict")
    _, module, losses = fit(dict(transformer=TransformerConfig(), init_from=base, lora=Lora(r=4)))
    assert min(losses[4:]) < losses[0]
    original = load_checkpoint(base)[0].state_dict()
    moved = 0.0
    for name, value in module.transformer.state_dict().items():
        if is_adapter(name):
            moved += float(value.abs().sum()) if ".lora_B." in name else 0.0
        else:
            assert torch.equal(value.cpu(), original[plain_name(name)]), name
    assert moved > 0


def test_the_average_is_that_of_the_weights(fit: Any) -> None:
    class Weights(EmaWeights):
        def __init__(self) -> None:
            super().__init__(0.5, warmup=False)
            self.wanted: list[torch.Tensor] = []

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            now = [p.detach().double() for p in pl_module.transformer.parameters()]
            self.wanted = [(a + b) / 2 for a, b in zip(self.wanted, now, strict=True)] if self.wanted else now
            super().on_train_batch_end(trainer, pl_module, *args)

    ema = Weights()
    _, module, _ = fit(callbacks=(ema,))
    for found, wanted in zip(module.transformer.parameters(), ema.wanted, strict=True):
        torch.testing.assert_close(found, wanted.float().to(found.device))


def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(fit: Any, tmp_path: Path) -> None:
    """Kernels add in no fixed order on a GPU: losses agree to 1e-4, where another row changes them by 1e-2."""
    whole = fit()[2]
    first, _, _ = fit(max_steps=4)
    first.save_checkpoint(tmp_path / "four.ckpt")
    _, _, rest = fit(ckpt_path=str(tmp_path / "four.ckpt"))
    assert rest == pytest.approx(whole[4:], rel=1e-4)
    moved = [abs(a / b - 1) for a, b in zip(whole[5:], whole[4:-1], strict=True)]
    assert max(moved) > 1e-2
