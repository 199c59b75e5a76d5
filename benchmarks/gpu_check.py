"""How fast is one GPU, and does everything run on it? Bandwidth, decoding, a training step, the gpu tests; six minutes.

    python benchmarks/gpu_check.py FOLDER                  # torch 2.11 or later and one CUDA device
    python benchmarks/gpu_check.py FOLDER --only decode train
    python benchmarks/gpu_check.py FOLDER --tiny           # toy sizes on any machine, to try the script itself

Each part writes FOLDER/gpu_check.json anew, so that a visit that is cut off keeps what it has; a part that fails says
so in one line and the next one goes on. The tests compare fits in each precision and strategy, and every sampler, with
the CPU. The package need not be installed.
"""
# ruff: noqa: E402

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

from dllm_var.benchmarking.instruments import describe_machine, synchronise
from dllm_var.benchmarking.settings import COMPILED, OURS, TrainingCase
from dllm_var.benchmarking.training import TrainingRun
from dllm_var.callbacks.speed import measure_peak_flops
from dllm_var.model import Transformer, TransformerConfig
from dllm_var.sampling import (
    AutoregressiveSampler,
    BlockDiffusionSampler,
    ConfidenceThreshold,
    StridedSampler,
    captured,
)

VOCABULARY = 126_464
SPECIAL: dict[str, Any] = dict(mask_id=126_336, terminator_ids=[126_081, 126_348], pad_id=126_081)
LLADA = dict(hidden_size=4096, num_layers=32, num_heads=32, intermediate_size=12288, rope_theta=5e5)
DECODED = {"8.0B": LLADA, "0.57B": dict(hidden_size=1024, num_layers=24, num_heads=16, intermediate_size=2816)}
TRAINED = dict(hidden_size=2048, num_layers=16, num_heads=16, intermediate_size=5632)
TINY = dict(hidden_size=64, num_layers=2, num_heads=2)
PROMPT, TEST_SECONDS = 128, 240


def random_model(shape: dict[str, Any], device: torch.device, causal: bool = False) -> Transformer:
    """Builds a model in bf16 whose weights are drawn where they are, in seconds."""
    with torch.device("meta"):
        model = Transformer(TransformerConfig(**shape, **SPECIAL, vocab_size=VOCABULARY, causal=causal))
    model.to(torch.bfloat16).to_empty(device=device)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1) if parameter.dim() == 1 else parameter.normal_(std=0.02)
    return model.eval().requires_grad_(False)


def timed(call: Callable[[], Any], device: torch.device, repeats: int = 10) -> float:
    """Returns the median time of a call in milliseconds, each waited for."""
    seconds = []
    for number in range(3 + repeats):
        synchronise(device)
        began = time.perf_counter()
        call()
        synchronise(device)
        if number >= 3:
            seconds.append(time.perf_counter() - began)
    return 1e3 * median(seconds)


def machine(device: torch.device, tiny: bool, folder: Path) -> dict[str, Any]:
    source = torch.randn(2**20 if tiny else 2**30, device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    milliseconds = timed(lambda: target.copy_(source), device)
    return {
        **describe_machine(device),
        "cudnn": torch.backends.cudnn.version(),
        "copy TB/s": 4 * source.numel() / milliseconds / 1e9,
        "bf16 GEMM TFLOP/s": measure_peak_flops(device, torch.bfloat16) / 1e12,
    }


def decode(device: torch.device, tiny: bool, folder: Path) -> dict[str, Any]:
    """Times forwards, whole samplers and transformers' `generate` on models with random weights, in bf16.

    A forward is timed as Python launches it, and replayed as a CUDA graph: what a sampler's forward can at best take.
    """
    found: dict[str, Any] = {}
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(0, SPECIAL["pad_id"], (16, PROMPT), generator=generator).tolist()
    limit = 8 if tiny else 64
    for name, shape in {"tiny": TINY}.items() if tiny else DECODED.items():
        model = random_model(shape, device)
        with torch.inference_mode():
            cache = model.new_cache(1, PROMPT + 64)
            for width in (1, 32, 64):
                tokens = torch.randint(0, SPECIAL["pad_id"], (1, width), device=device)

                def forward(model: Transformer = model, tokens: torch.Tensor = tokens, cache: Any = cache) -> Any:
                    cache.open(tokens.size(1))
                    return model.lm_head(model.hidden_states(tokens, cache=cache))

                found[f"{name}, forward of {width}, ms"] = timed(forward, device)
                if device.type == "cuda":
                    replay = captured.cuda_graph(lambda _, forward=forward: forward(), tokens)
                    found[f"{name}, the same as a graph, ms"] = timed(replay, device)
        for batch in (1, 16):
            block = BlockDiffusionSampler(ConfidenceThreshold(0.9), block_length=32, batch_size=batch)
            found |= per_forward(f"{name}, block diffusion, batch {batch}", block, model, prompts[:batch], limit)
        captured.release(model)
        del model, cache, forward  # the next model takes their memory
        model = random_model(shape, device, causal=True)
        found |= per_forward(f"{name}, autoregressive", AutoregressiveSampler(), model, prompts[:1], min(limit, 48))
        strided = StridedSampler(8, least_chance=0.2)
        found |= per_forward(f"{name}, strided", strided, model, prompts[:1], min(limit, 48))
        captured.release(model)
        del model
        found[f"{name}, transformers' generate per token, ms"] = transformers_per_token(shape, prompts[0], device)
    return found


def per_forward(name: str, sampler: Any, model: Transformer, prompts: Any, limit: int) -> dict[str, float]:
    """Returns the milliseconds of a forward, with all around it, and in how many calls its tokens differ.

    Nothing ends an answer early. The steps are captured and replayed where they can be, and then not captured at all.
    """
    found, answers, captures = dict[str, float](), [], dict(captured.CAPTURES)
    device = model.embedding.weight.device
    for how in ("", ", not captured"):
        for _ in range(2):  # the second call finds its steps captured
            synchronise(device)
            began = time.perf_counter()
            answers.append(sampler.generate(model, prompts, suppress=SPECIAL["terminator_ids"], max_new_tokens=limit))
            synchronise(device)
        seconds = time.perf_counter() - began
        found[f"{name}, per forward{how}, ms"] = 1e3 * seconds / max(answer.nfe for answer in answers[-1])
        captured.CAPTURES.clear()
    captured.CAPTURES.update(captures)
    tokens = [[answer.tokens for answer in call] for call in answers]
    found[f"{name}, calls with other tokens"] = sum(call != tokens[-1] for call in tokens)
    return found


def transformers_per_token(shape: dict[str, Any], prompt: list[int], device: torch.device) -> float:
    """Returns the milliseconds of a token of transformers' Llama of the same shape, decoded greedily."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {key: shape[key] for key in ("hidden_size", "intermediate_size") if key in shape}
    layers, heads = shape["num_layers"], shape["num_heads"]
    config = LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=layers, num_attention_heads=heads, **sizes)
    with torch.device("meta"):
        llama = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    llama.to_empty(device=device)
    with torch.no_grad():
        for parameter in llama.parameters():
            parameter.normal_(std=0.02)
    rotary = llama.model.rotary_emb  # its frequencies are no parameters
    llama.model.rotary_emb = type(rotary)(config).to(device)
    settings: Any = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    ids = torch.tensor([prompt], device=device)
    llama.generate(ids, max_new_tokens=4, **settings)
    synchronise(device)
    began = time.perf_counter()
    llama.generate(ids, max_new_tokens=24, **settings)
    synchronise(device)
    return 1e3 * (time.perf_counter() - began) / 24


def train(device: torch.device, tiny: bool, folder: Path) -> dict[str, Any]:
    """Steps of a 1.1B model in bf16-mixed, documents of 420 tokens in two rows of 4,096, eager and compiled."""
    shape, length, contenders = (TINY, 512, [OURS]) if tiny else (TRAINED, 4096, [OURS, COMPILED])
    case = TrainingCase("gpu check", VOCABULARY, dict(shape), length, 2, 12, contenders, 120, 300)
    run = TrainingRun(case, 1, device, folder / "cache")
    run.run()
    found: dict[str, Any] = {}
    for contender in run.result()["contenders"]:
        for figure in ("step_seconds", "tokens_per_second", "mfu"):
            found[f"{contender['name']}, {figure}"] = contender[figure]
        found[f"{contender['name']}, peak memory GiB"] = (contender["peak_memory_bytes"] or 0) / 2**30
    return found


def tests(device: torch.device, tiny: bool, folder: Path) -> dict[str, Any]:
    """Runs tests/gpu in a process of its own and returns how many passed, failed and were skipped."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "--durations", "15", "tests/gpu"]
    if tiny:
        command += ["--collect-only"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with (folder / "tests.log").open("w") as log:
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=log, timeout=TEST_SECONDS)
    lines = (folder / "tests.log").read_text().splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return {"status": done.returncode, "summary": lines[-1] if lines else "", "failed": failed}


PARTS = {"machine": machine, "decode": decode, "train": train, "tests": tests}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="gets gpu_check.json and tests.log")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to run")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, on any machine")
    options = parser.parse_args()
    if not options.tiny and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device; --tiny tries the script without one")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    warnings.simplefilter("ignore")
    options.folder.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"tiny": options.tiny}
    for name in options.only:
        began = time.perf_counter()
        try:
            found = PARTS[name](device, options.tiny, options.folder)
        except Exception as error:  # the next part may still say something
            found = {"failed": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
        results[name] = {**found, "part took, s": time.perf_counter() - began}
        (options.folder / "gpu_check.json").write_text(json.dumps(results, indent=1) + "\n")
        print(f"\n{name}")
        for figure, value in results[name].items():
            shown = f"{value:>14,.2f}" if isinstance(value, float) else value
            print(f"  {figure:<64}{shown}", flush=True)


if __name__ == "__main__":
    main()
