"""Measures decoding on one device, with random weights: bare forwards, this package's samplers, and others' loops."""

import gc
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor

from dllm_var.benchmarking.instruments import llama_config, peak_bandwidth, random_model, shown, synchronise
from dllm_var.benchmarking.results import against_bar
from dllm_var.benchmarking.settings import DecodingCase
from dllm_var.errors import one_line
from dllm_var.model import Transformer, TransformerConfig
from dllm_var.sampling import AutoregressiveSampler, BlockDiffusionSampler, ConfidenceThreshold, captured
from dllm_var.sampling.base import special_ids
from dllm_var.sampling.guards import without_training_modes

Figures = dict[str, Any]
WARM_UP, REPEATS = 3, 10  # calls of a forward
NOT_CAPTURED = ", not captured"
GRAPHS = {  # what each is compared with
    "bare forward": "bare graph",
    "bare forward of 1": "bare graph of 1",
    "bare forward, batch": "bare graph, batch",
    "block diffusion": "bare graph",
    "block diffusion, batch": "bare graph, batch",
    "released loop": "bare graph",
    "autoregressive": "bare graph of 1",
    "transformers' generate": "bare graph of 1",
}
BARS = {  # ratios of the milliseconds of a forward: above, below, and what the first may or shall be of the second
    "block_over_graph": ("block diffusion", "bare graph", 1.25, "at most"),
    "autoregressive_over_graph": ("autoregressive", "bare graph of 1", 1.25, "at most"),
    "batch_over_forward": ("block diffusion, batch", "bare forward, batch", 1.15, "at most"),
    "over_generate": ("transformers' generate", "autoregressive", 3.0, "at least"),
    "over_released_loop": ("released loop", "block diffusion", 3.0, "at least"),
}


class DecodingRun:
    """All measurements of one case; an exception that ends it leaves them."""

    def __init__(self, case: DecodingCase, device: torch.device) -> None:
        self.case, self.device = case, device
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.milliseconds: dict[str, float] = {}  # of a forward, with all around it
        self.failed: dict[str, str] = {}
        self.peak_memory: int | None = None
        self.bandwidth: float | None = None  # bytes per second
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(3, case.vocab_size, (max(case.batch_size, 1), case.prompt_tokens), generator=generator)
        self.prompts: list[list[int]] = tokens.tolist()
        with torch.device("meta"):
            self.weights = Transformer(self._shape(False)).num_parameters

    def _shape(self, causal: bool) -> TransformerConfig:
        special: Any = dict(mask_id=0, terminator_ids=[1], pad_id=2)
        return TransformerConfig(**self.case.transformer, vocab_size=self.case.vocab_size, causal=causal, **special)

    def run(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self.bandwidth = peak_bandwidth(self.device, 2**30 if self.device.type == "cuda" else 2**22)
        for part in shown(f"{self.case.name}: decoding", (self._diffusion, self._autoregressive, self._transformers)):
            try:
                part()
            except RuntimeError as error:  # such as no memory: the next part may still say something
                self.failed[part.__name__.strip("_")] = one_line(error)
            gc.collect()  # the next model takes the memory of this one
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        if self.device.type == "cuda":
            self.peak_memory = torch.cuda.max_memory_allocated(self.device)

    def _diffusion(self) -> None:
        case, model = self.case, random_model(self._shape(False), self.device, self.dtype)
        self._bare(model, "bare forward", "bare graph", 1, case.block_length)
        self._bare(model, "bare forward of 1", "bare graph of 1", 1, 1)
        self._bare(model, "bare forward, batch", "bare graph, batch", case.batch_size, case.block_length)
        for name, rows in (("block diffusion", 1), ("block diffusion, batch", case.batch_size)):
            sampler = BlockDiffusionSampler(ConfidenceThreshold(0.9), block_length=case.block_length, batch_size=rows)
            self._sampled(name, sampler, model, rows)

        def released() -> int:
            return released_loop(model, self.prompts[0], case.block_length, case.limit)

        self.milliseconds["released loop"] = min(self._timed(released) for _ in range(2))
        captured.release(model)

    def _autoregressive(self) -> None:
        model = random_model(self._shape(True), self.device, self.dtype)
        self._sampled("autoregressive", AutoregressiveSampler(), model, 1)
        captured.release(model)

    def _transformers(self) -> None:
        from transformers import LlamaForCausalLM

        config = llama_config(self._shape(True), "bfloat16" if self.dtype == torch.bfloat16 else "float32")
        with self.device:
            llama: Any = LlamaForCausalLM(config).eval()
        llama.to(self.dtype)
        ids, tokens = torch.tensor(self.prompts[:1], device=self.device), min(self.case.limit, 24)

        def generate() -> int:
            settings: Any = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
            llama.generate(ids, max_new_tokens=tokens, **settings)
            return tokens

        self.milliseconds["transformers' generate"] = min(self._timed(generate) for _ in range(2))

    def _bare(self, model: Transformer, name: str, as_graph: str, rows: int, width: int) -> None:
        """Times a forward of layers and head behind the prompt, as Python launches it and as a CUDA graph."""
        cache = model.new_cache(rows, self.case.prompt_tokens + width)
        tokens = torch.zeros(rows, width, dtype=torch.long, device=self.device)
        with torch.inference_mode(), without_training_modes(model):
            cache.open(self.case.prompt_tokens)
            model.hidden_states(torch.tensor(self.prompts[:rows], device=self.device), cache=cache)
            cache.advance(torch.full((rows,), self.case.prompt_tokens))
            cache.open(width)  # outside the graph: it copies numbers from the host

            def forward() -> Tensor:
                return model.lm_head(model.hidden_states(tokens, cache=cache))

            self.milliseconds[name] = self._per_call(forward)
            if self.device.type in captured.CAPTURES:
                replay = captured.CAPTURES[self.device.type](lambda _: forward(), tokens)
                self.milliseconds[as_graph] = self._per_call(replay)

    def _per_call(self, call: Callable[[], Any]) -> float:
        def once() -> int:
            call()
            return 1

        times = [self._timed(once) for _ in range(WARM_UP + REPEATS)]
        return median(times[WARM_UP:])

    def _timed(self, call: Callable[[], int]) -> float:
        """Returns the milliseconds of a call, which is waited for, for each of the forwards that it returns."""
        synchronise(self.device)
        began = time.perf_counter()
        forwards = call()
        synchronise(self.device)
        return 1e3 * (time.perf_counter() - began) / forwards

    def _sampled(self, name: str, sampler: Any, model: Transformer, rows: int) -> None:
        """Times a sampler, as it is and with steps that are not captured; nothing ends an answer early."""
        settings: Any = {"suppress": model.config.terminator_ids, "max_new_tokens": self.case.limit}

        def generate() -> int:
            return max(answer.nfe for answer in sampler.generate(model, self.prompts[:rows], **settings))

        captures = dict(captured.CAPTURES)
        for how in ("", NOT_CAPTURED) if self.device.type in captures else ("",):
            try:
                if how:
                    captured.CAPTURES.clear()
                self.milliseconds[name + how] = min(self._timed(generate) for _ in range(3))  # the first one captures
            finally:
                captured.CAPTURES.update(captures)

    def result(self) -> Figures:
        """Returns the case's figures and bars as plain data."""
        found, bars = self.milliseconds, {}
        for name, (above, below, bar, direction) in BARS.items():
            value = found[above] / found[below] if above in found and below in found else None
            bars[f"{name} ({self.case.name})"] = against_bar(value, bar, direction)
        ways = []
        for name, value in found.items():
            graph = found.get(GRAPHS.get(name.removesuffix(NOT_CAPTURED), name))
            ways.append({"name": name, "milliseconds": value, "over_graph": value / graph if graph else None})
        weight_bytes = self.weights * self.dtype.itemsize
        return {
            **vars(self.case),
            "parameters": self.weights,
            "bandwidth": self.bandwidth,
            "read_weights_ms": 1e3 * weight_bytes / self.bandwidth if self.bandwidth else None,
            "ways": ways,
            "peak_memory_bytes": self.peak_memory,
            "failed": self.failed,
            "bars": bars,
        }


@torch.inference_mode()
def released_loop(model: Transformer, prompt: Sequence[int], block_length: int, limit: int) -> int:
    """Decodes one prompt as dLLM-Var's released loop does, on our layers; returns the number of forwards.

    Each step waits for the device to say whether masks are left. A finished block is frozen in the forward that first
    reads the next one.
    """
    mask_id, terminators = special_ids(model)
    device = model.embedding.weight.device
    cache = model.new_cache(1, len(prompt) + limit + 2 * block_length)
    masks = torch.full((1, block_length), mask_id, device=device)
    frozen, forwards = torch.tensor([list(prompt)], device=device), 0
    with without_training_modes(model):
        for _ in range(0, limit, block_length):
            block = masks.clone()
            read = torch.cat((frozen, block), dim=1)
            while True:
                cache.open(read.size(1))
                hidden = model.hidden_states(read, cache=cache)[:, -block_length:]
                forwards += 1
                logits = model.lm_head(hidden).float()
                logits[..., [mask_id, *terminators]] = -torch.inf
                confidence, token = logits.softmax(dim=-1).max(dim=-1)
                confidence = torch.where(block == mask_id, confidence, -torch.inf)
                commit = confidence > 0.9
                commit[0, confidence.argmax()] = True
                block = torch.where(commit, token, block)
                if read.size(1) > block_length:
                    cache.advance(torch.tensor([read.size(1) - block_length]))
                if not (block == mask_id).any():
                    break
                read = block
            frozen = block
    return forwards
