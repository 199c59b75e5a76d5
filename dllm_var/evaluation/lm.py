"""A checkpoint as a model of lm-evaluation-harness, registered there as `dllm_var`."""

import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, simple_parse_args_string
from tqdm import tqdm

from dllm_var.checkpoints.pretrained import load_checkpoint
from dllm_var.errors import UserError
from dllm_var.evaluation.likelihood import Likelihood, Pair, Score
from dllm_var.model.transformer import Transformer
from dllm_var.sampling import Generation, Sampler
from dllm_var.sampling.base import sampler_from_config
from dllm_var.sampling.defaults import default_sampler
from dllm_var.sampling.guards import finite_logits
from dllm_var.text.tokenizer import Tokenizer

LONGEST_WINDOW = 2048  # tokens at a time in rolling likelihoods, for models that do not say what they were trained on


@dataclass
class Decoded:
    """Answers of one task and the wall time of decoding them."""

    answers: list[Generation] = field(default_factory=list)
    seconds: float = 0.0

    def figures(self) -> dict[str, float]:
        """Returns what docs/evaluate.md explains: forwards, speed, and shares of the ways to end."""
        count = max(len(self.answers), 1)
        tokens = sum(len(answer.tokens) for answer in self.answers)
        forwards = sum(answer.nfe + answer.auxiliary_nfe for answer in self.answers)
        reasons = [answer.finish_reason for answer in self.answers]
        return {
            "answers": len(self.answers),
            "tokens": tokens,
            "seconds": self.seconds,
            "nfe": forwards / count,
            "tokens_per_forward": tokens / max(forwards, 1),
            "useful_tokens_per_second": tokens / max(self.seconds, 1e-9),
            "ended_by_eos": reasons.count("eos") / count,
            "ended_by_stop": reasons.count("stop") / count,
            "hit_limit": reasons.count("length") / count,
        }


@register_model("dllm_var")
class EvaluatedModel(TemplateLM):
    """Answers the harness's requests: `generate_until` with a sampler, likelihoods as `Likelihood` says.

    The sampler's temperature is used, whatever a task asks for; `max_new_tokens` replaces the limits of tasks and
    sampler.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        sampler: Sampler | None = None,
        likelihood: Likelihood = Likelihood(),  # noqa: B008
        max_new_tokens: int | None = None,
    ) -> None:
        super().__init__()
        self.model, self.tokenizer, self.likelihood = model, tokenizer, likelihood
        self.sampler = sampler or default_sampler(model.config)
        self.max_new_tokens, self.quiet = max_new_tokens, not sys.stderr.isatty()
        self.decoded: defaultdict[str, Decoded] = defaultdict(Decoded)  # by task
        self._told = self._renders = False

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> "EvaluatedModel":
        """Loads a checkpoint, for `lm_eval.simple_evaluate(model="dllm_var", model_args={"checkpoint": PATH, ...})`.

        `arg_dict` has `checkpoint`, `max_new_tokens` and settings of `Likelihood`; `additional_config` has the
        harness's `device` and `batch_size`. The sampler is the checkpoint's.
        """
        settings = {**{k: v for k, v in (additional_config or {}).items() if v is not None}, **arg_dict}
        settings.pop("max_batch_size", None)
        device = settings.pop("device", None) or ("cuda" if torch.cuda.is_available() else "cpu")
        model, tokenizer, meta = load_checkpoint(settings.pop("checkpoint"), device)
        sampler = sampler_from_config(meta["sampler"]) if meta.get("sampler") else None
        longest = settings.pop("max_new_tokens", None)
        return cls(model, tokenizer, sampler, Likelihood(**settings), longest)

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict | None = None) -> "EvaluatedModel":
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.terminator_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return self.tokenizer.encode_rendered(string) if self._renders else self.tokenizer.encode(string)

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.fingerprint

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Returns the text of a conversation; without a generation prompt its last turn is left open, to go on in."""
        self._renders = True  # from now on texts have the template's special tokens, and marks where people spell them
        messages = self.tokenizer.mark(chat_history)
        text = self.tokenizer.render(messages, add_generation_prompt)
        if add_generation_prompt:
            return text
        content = messages[-1]["content"].strip()
        if content not in text:
            raise UserError("the chat template leaves the last turn out or changes it: evaluate without --chat")
        return text[: text.rindex(content) + len(content)]

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Decodes the requests, those of one task with the same stop strings and limit in one call."""
        groups: dict[tuple[str, tuple[str, ...], int | None], list[int]] = {}
        ours = getattr(self.sampler, "temperature", 0.0)
        for index, request in enumerate(requests):
            settings = request.args[1]
            asked = float(settings.get("temperature") or 0) if settings.get("do_sample") else 0.0
            if asked != ours and not self._told:
                self._told = True
                wanted = f"{request.task_name} asks for temperature {asked:g}"
                print(f"{wanted}, the sampler has {ours:g}, which is used", file=sys.stderr)
            stops = settings.get("until") or []
            stops = [stops] if isinstance(stops, str) else stops
            limit = self.max_new_tokens or settings.get("max_gen_toks")
            group = str(request.task_name), tuple(text for text in stops if text), limit
            groups.setdefault(group, []).append(index)
        texts = [""] * len(requests)
        with tqdm(total=len(requests), unit=" answers", disable=disable_tqdm or self.quiet) as progress:
            for (task, stop, limit), indices in groups.items():
                prompts = [self.tok_encode(requests[index].args[0]) or [self.prefix_token_id] for index in indices]
                began = time.perf_counter()
                answers = self.sampler.generate(
                    self.model,
                    prompts,
                    tokenizer=self.tokenizer,
                    max_new_tokens=limit,
                    stop=stop,
                    on_answer=lambda *_: progress.update() and None,
                )
                decoded = self.decoded[task]
                decoded.seconds += time.perf_counter() - began
                decoded.answers += answers
                for index, answer in zip(indices, answers, strict=True):
                    texts[index] = answer.text or ""
        return texts

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        return [*self._score([(context, continuation) for _, context, continuation in requests], disable_tqdm)]

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Scores whole texts, the long ones window by window; for a diffusion model each window is a bound."""
        windows: list[tuple[int, Pair]] = []
        for number, request in enumerate(requests):
            of_text = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.model.config.context_length or LONGEST_WINDOW,
                context_len=1,
            )
            windows += [(number, make_disjoint_window(window)) for window in of_text]
        scores = self._score([window for _, window in windows], disable_tqdm, decode=False)
        totals = [0.0] * len(requests)
        for (number, _), score in zip(windows, scores, strict=True):
            totals[number] += score.log_likelihood
        return totals

    def _score(self, pairs: Sequence[Pair], disable_tqdm: bool, decode: bool = True) -> list[Score]:
        with finite_logits(self.model) as check:
            scores = self.likelihood(self.model, pairs, decode, quiet=disable_tqdm or self.quiet)
            check()
        return scores
