"""Guards around decoding: training modes are off, and predictions that are not numbers are noticed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dllm_var.errors import UserError
from dllm_var.model.transformer import Transformer
from dllm_var.sampling.captured import release

DECODING = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]  # attention on a GPU


@contextmanager
def without_training_modes(transformer: Transformer) -> Iterator[None]:
    """Switches off what is for training only: the training mode, mixed precision, compiled blocks, cuDNN's attention.

    Decoding runs in the type of the weights, which is also the cache's. Compiled blocks would be compiled again for
    every shape that decoding meets, and cuDNN makes a plan for each, in tens of milliseconds. The check of
    `trainer.deterministic` is off, too: it refuses `put_`, which is deterministic at distinct places.
    """
    checked = torch.are_deterministic_algorithms_enabled()
    only_warns = torch.is_deterministic_algorithms_warn_only_enabled()
    kind = transformer.embedding.weight.device.type
    was_training = transformer.training
    if was_training:  # visiting every module takes a noticeable part of a short answer's time
        transformer.eval()
    try:
        if checked:
            torch.use_deterministic_algorithms(False)
        eager = torch.compiler.set_stance("force_eager") if transformer.compiled else nullcontext()
        with torch.autocast(kind, enabled=False), eager, sdpa_kernel(DECODING) if kind == "cuda" else nullcontext():
            yield
    finally:
        if checked:
            torch.use_deterministic_algorithms(True, warn_only=only_warns)
        if was_training:
            transformer.train()
            release(transformer)


class NotFinite(UserError):
    """A model's logits were NaN or infinite, so that there is no most likely token."""


@contextmanager
def finite_logits(model: Transformer) -> Iterator[Callable[[], None]]:
    """Watches a model's output head; yields a function that raises `NotFinite` when a logit was NaN or infinite.

    Each forward leaves one number on the device; the function waits for it, so it is called only with an answer. The
    number stays where it is from call to call, as captured forwards write to it.
    """
    device = model.embedding.weight.device
    if model.not_finite is None or model.not_finite.device != device:
        with torch.inference_mode(False):  # it outlives this request
            model.not_finite = torch.zeros((), device=device)
    nothing = model.not_finite.zero_()

    def watch(head: Any, inputs: Any, logits: Tensor) -> None:
        if logits.numel():
            most = logits.detach().aminmax().max  # NaN when any is; amax is slower in 16 bits
            nothing.add_(most - most)  # NaN when it is infinite, too

    def check() -> None:
        if nothing.isnan():
            raise NotFinite(
                "the model's predictions are not numbers (NaN or infinite): its training diverged, or its numbers are "
                "too large for its type; take an earlier checkpoint, or weights in bfloat16 or float32"
            )

    handle = model.lm_head.register_forward_hook(watch)
    try:
        yield check
    except Exception:
        check()  # whatever was raised came of it
        raise
    finally:
        handle.remove()


def lacks_memory(error: BaseException) -> bool:
    """Whether an error says that memory could not be had; torch has no class for it on a CPU."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
