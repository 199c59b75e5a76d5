"""The order of attention kernels: the fastest first, measured once."""

import math

import pytest
import torch
from torch.nn.attention import SDPBackend

from dllm_var.model import attention_kernels
from dllm_var.model.attention import Seen, attend
from dllm_var.model.attention_kernels import OTHERWISE, remembered, seconds_of

CUDNN, FLASH = SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION


@pytest.mark.parametrize(("seconds", "order"), [((1, 2), (CUDNN, FLASH)), ((math.inf, 2), (FLASH, CUDNN))])
def test_each_card_is_measured_once(seconds, order, tmp_path, monkeypatch):
    monkeypatch.setenv("DLLM_VAR_CACHE", str(tmp_path / "cache"))
    measured = []

    def measure(name):
        measured.append(name)
        return dict(zip(("cudnn", "flash"), seconds, strict=True))[name]

    for _ in range(2):
        assert remembered("this card", measure) == (*order, *OTHERWISE)
        assert measured == ["cudnn", "flash"]
    assert remembered("another card", lambda name: 0.0)[:2] == (CUDNN, FLASH)
    assert remembered("this card", measure)[:2] == order and len(measured) == 2
    for file in (tmp_path / "cache").rglob("*.json"):
        file.write_text("{broken")
    for _ in range(2):
        assert remembered("this card", measure)[:2] == order and len(measured) == 4


def test_a_folder_that_cannot_be_written_is_no_failure(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DLLM_VAR_CACHE", str(tmp_path / "file"))
    assert remembered("card", lambda name: 0.0)[:2] == (CUDNN, FLASH)


def test_a_kernel_is_timed_and_one_that_is_not_there_takes_for_ever(monkeypatch):
    monkeypatch.setattr(attention_kernels, "MEASURED_ROWS_TOKENS", 64)
    sizes, cpu = (32, 4, 2, 8), torch.device("cpu")
    assert 0 < seconds_of(SDPBackend.MATH, sizes, False, torch.float32, cpu) < 10

    def missing(*args, **kwargs):
        raise RuntimeError("No available kernel. Aborting execution.")

    monkeypatch.setattr(attention_kernels.F, "scaled_dot_product_attention", missing)
    assert seconds_of(CUDNN, sizes, False, torch.float32, cpu) == math.inf


@pytest.mark.parametrize("causal", [False, True])
def test_an_order_changes_nothing_and_is_compiled_without_a_break(causal):
    queries, keys, values = torch.randn(2, 16, 8, 8).split((4, 2, 2), dim=2)
    expected = attend(queries, keys, values, Seen(is_causal=causal))
    ordered = Seen(is_causal=causal, kernels=(SDPBackend.MATH, SDPBackend.FLASH_ATTENTION))
    torch.testing.assert_close(attend(queries, keys, values, ordered), expected)
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(queries, keys, values, ordered), expected)
