"""The contract of samplers: prompts in, answers out."""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from dllm_var.errors import UserError
from dllm_var.model.config import TransformerConfig
from dllm_var.model.transformer import Transformer
from dllm_var.sampling.configurable import Configurable, build
from dllm_var.sampling.guards import finite_logits, without_training_modes
from dllm_var.sampling.recording import RecordedStep, Recording, replay_of
from dllm_var.sampling.stopping import StopStrings
from dllm_var.text.tokenizer import Tokenizer
from dllm_var.view import frame

OnBlock = Callable[[int, list[int]], None]
OnAnswer = Callable[[int, "Generation"], None]
OnStep = Callable[[int, RecordedStep], None]


@dataclass
class Request:
    """What the caller of `generate` asks for, and how tokens and answers get back to the caller."""

    max_new_tokens: int | None = None  # longest answer, instead of the sampler's own limit
    suppressed: tuple[int, ...] = ()  # token ids that are never produced; the mask token never is
    tokenizer: Tokenizer | None = None  # the model's, when known; a second model must have the same
    stop: StopStrings | None = None  # finds the texts that end an answer
    on_block: OnBlock | None = None
    on_answer: OnAnswer | None = None
    check: Callable[[], None] = lambda: None  # raises when the model's predictions were not numbers
    context: int | None = None  # tokens of the longest prompt and its answer, when prompts enter a running engine
    log_probabilities: bool = False  # whether answers get the log-probabilities of their tokens
    records: bool = False  # whether answers get the steps that led to them
    on_step: OnStep | None = None  # called with each step
    _recordings: dict[int, Recording] = field(init=False, default_factory=dict)
    _told: set[int] = field(init=False, default_factory=set)  # prompts whose answer the caller has

    @property
    def follows(self) -> bool:
        """Whether answers matter before they are complete."""
        return self.on_block is not None or self.stop is not None

    def advanced(self, index: int, tokens: list[int], log_probabilities: list[float] | None) -> bool:
        """Takes the tokens of an answer so far, with their log-probabilities if these are wanted.

        Returns whether a stop string ends the answer.
        """
        cut = None if self.stop is None else self.stop.find(index, tokens)
        if self.on_block is not None:
            self.check()
            self.on_block(index, tokens if cut is None else tokens[: cut[0]])
        return cut is not None

    def wants_steps(self, index: int) -> bool:
        """Whether a prompt's answer is recorded."""
        return self.records

    def stepped(
        self,
        index: int,
        forward: int,
        tokens: list[int | None],
        log_probabilities: list[float] | None,
        starts: Sequence[int] = (),
    ) -> None:
        """Takes an answer as a forward has left it, with None for masks, and where its open blocks begin."""
        recording = self._recordings.setdefault(index, Recording())
        step = recording.add(forward, tokens, log_probabilities, starts)
        if self.on_step is not None and step is not None:
            self.check()
            self.on_step(index, step)

    def finished(self, index: int, answer: "Generation") -> None:
        """Takes a complete answer, cuts it at its stop string, adds its text and tells the caller, once a prompt."""
        if index in self._told:
            return
        self.check()
        self._told.add(index)
        if not self.log_probabilities:  # another request in the batch may have wanted them
            answer.log_probabilities = None
        cut = None if self.stop is None else self.stop.cut(answer.tokens)
        if cut is not None:
            kept, answer.text = cut
            answer.tokens, answer.finish_reason = answer.tokens[:kept], "stop"
            answer.commit_steps = None if answer.commit_steps is None else answer.commit_steps[:kept]
            if answer.log_probabilities is not None:
                answer.log_probabilities = answer.log_probabilities[:kept]
        elif self.tokenizer is not None:
            answer.text = self.tokenizer.decode(answer.tokens)
        answer.tokenizer = self.tokenizer
        if self.records and (index in self._recordings or answer.nfe == 1):  # not every sampler has an engine
            self.stepped(index, answer.nfe, [*answer.tokens], answer.log_probabilities)
            answer.steps = self._recordings.pop(index).steps
        if self.on_answer is not None:
            self.on_answer(index, answer)


@dataclass
class Generation:
    """One prompt's answer."""

    tokens: list[int]  # up to and excluding the terminator
    finish_reason: str  # `eos` when the model ended the answer, `length` when the limit did, `stop` for a stop string
    nfe: int  # forward passes of the model that the row took part in, the prefill included
    seconds: float  # from the row's admission to its end
    prompt_length: int  # tokens of the prompt
    text: str | None = None  # the answer decoded, when a tokenizer was given
    commit_steps: list[int] | None = None  # for each token the forward pass, counted from 1, that committed it
    auxiliary_nfe: int = 0  # forward passes of a sampler's second model that the row took part in
    drafted: int = 0  # tokens that were proposed to the model and verified by it; 0 for samplers without drafts
    accepted: int = 0  # those of them that the model confirmed
    # For each token the natural logarithm of the probability that the model gave it in the forward pass that committed
    # it, whatever the temperature; None unless `generate` was asked for them.
    log_probabilities: list[float] | None = None
    steps: list[RecordedStep] | None = field(default=None, repr=False)  # what each forward did, if it was recorded
    # What a replay needs besides.
    prompt: list[int] | None = field(default=None, repr=False)
    tokenizer: Tokenizer | None = field(default=None, repr=False, compare=False)

    @property
    def new_tokens(self) -> int:
        return len(self.tokens)

    def _repr_html_(self) -> str:
        """Shows in a notebook how the answer was decoded."""
        return frame([replay_of(self)])

    def as_json(self, prompt: str, **more: Any) -> str:
        """Returns the answer, the prompt's text and `more` entries as a line of JSON, for `generate --json`."""
        line = {
            "prompt": prompt,
            "text": self.text,
            "tokens": self.tokens,
            "prompt_tokens": self.prompt_length,
            "finish_reason": self.finish_reason,
            "nfe": self.nfe,
            "tokens_per_forward": round(self.new_tokens / max(self.nfe, 1), 4),
            "seconds": round(self.seconds, 6),
        }
        left_out = {*line, "prompt_length", "steps", "prompt", "tokenizer"}
        left_out |= set() if self.drafted else {"drafted", "accepted"}
        left_out |= {"log_probabilities"} if self.log_probabilities is None else set()
        others = {name: value for name, value in vars(self).items() if name not in left_out}
        return json.dumps({**line, **others, **more}, ensure_ascii=False)


class Sampler(Configurable, ABC):
    """Turns prompts into answers with a model; a new sampler is a subclass named by `class_path` in a config."""

    owner = "sampler"

    @abstractmethod
    def decode(self, model: Transformer, prompts: list[list[int]], request: Request) -> list[Generation]:
        """Decodes token-id prompts with a transformer in eval mode; the one method a sampler must have."""

    def generate(
        self,
        model: Any,
        prompts: Sequence[Sequence[int]] | Sequence[str] | str,
        *,
        tokenizer: Tokenizer | None = None,
        max_new_tokens: int | None = None,
        stop: Sequence[str] = (),
        suppress: Sequence[int] = (),
        on_block: OnBlock | None = None,
        on_answer: OnAnswer | None = None,
        log_probabilities: bool = False,
        record: bool = False,
        on_step: OnStep | None = None,
    ) -> list[Generation]:
        """Decodes prompts, token ids or texts, to their own ends and returns the answers in the prompts' order.

        Raises UserError for a prompt or setting that cannot be, `NotFinite` when logits are NaN or infinite.

        Args:
            model: A `Transformer`, or a module that holds one as `.transformer` (a `DiffusionLM`).
            prompts: A text by itself is one prompt.
            tokenizer: For text prompts, stop strings and the answers' texts; the model's own when None.
            max_new_tokens: Overrides the sampler's limit.
            stop: Texts that an answer ends before.
            suppress: Token ids that are never produced. Without a terminator an answer runs into its limit.
            on_block: Called with (prompt index, the answer's tokens so far) each time a row gets further. A later call
                may have fewer tokens: those that turn out to begin a stop string are taken back.
            on_answer: Called with (prompt index, answer) once for each prompt, as soon as the answer is complete.
            log_probabilities: Whether answers get the log-probabilities of their tokens.
            record: Whether answers get these and the steps that led to them, masks and tokens that were taken back
                included; every forward then waits for the device.
            on_step: Called with (prompt index, step) for each of these steps.
        """
        transformer = getattr(model, "transformer", model)
        known: Any = tokenizer or getattr(model, "tokenizer", None)
        prompts = [prompts] if isinstance(prompts, str) else prompts
        if any(isinstance(prompt, int) for prompt in prompts):
            raise UserError("prompts must be a list of prompts, texts or lists of token ids: one is [[1, 2]]")
        if known is None and (stop or any(isinstance(prompt, str) for prompt in prompts)):
            raise UserError("text prompts and stop strings need a tokenizer: pass generate(..., tokenizer=...)")
        ids = [known.encode(prompt) if isinstance(prompt, str) else [*map(int, prompt)] for prompt in prompts]
        check_request(ids, max_new_tokens, suppress, transformer.config)
        strings = StopStrings([stop] if isinstance(stop, str) else stop, known) if stop else None
        with torch.inference_mode(), without_training_modes(transformer), finite_logits(transformer) as check:
            request = Request(max_new_tokens, tuple(suppress), known, strings, on_block, on_answer, check)
            request.records, request.on_step = record or on_step is not None, on_step
            request.log_probabilities = log_probabilities or request.records
            answers = self.decode(transformer, ids, request)
            for index, answer in enumerate(answers):
                request.finished(index, answer)
        return answers


def check_request(
    prompts: list[list[int]], max_new_tokens: int | None, suppress: Sequence[int], config: TransformerConfig
) -> None:
    """Raises UserError for an empty prompt, ids outside the vocabulary, no length, or when no token is left."""
    vocab_size = config.vocab_size
    assert vocab_size is not None
    named = {**{f"prompt {index}": prompt for index, prompt in enumerate(prompts)}, "suppress": suppress}
    for name, tokens in named.items():
        if name != "suppress" and not tokens:
            raise UserError(f"{name} is empty: give at least one token")
        wrong = next((token for token in tokens if not 0 <= token < vocab_size), None)
        if wrong is not None:
            raise UserError(f"{name} has token id {wrong}, outside the vocabulary of {vocab_size}")
    if len({*suppress, config.mask_id} - {None}) >= vocab_size:
        raise UserError("suppress names every token: leave at least one that can be produced")
    if max_new_tokens is not None and max_new_tokens < 1:
        raise UserError(f"max_new_tokens must be at least 1, got {max_new_tokens}")


def special_ids(model: Transformer) -> tuple[int, tuple[int, ...]]:
    """Returns the model's mask id and terminator ids; raises UserError when its config lacks either."""
    config = model.config
    if config.mask_id is None or not config.terminator_ids:
        raise UserError("the model's config has no mask_id or terminator_ids: set both to decode by diffusion")
    return config.mask_id, tuple(config.terminator_ids)


def last_sampler(callbacks: Iterable[Any]) -> Sampler | None:
    """Returns the sampler of the last callback that has one: how the model in training is meant to be decoded."""
    return next((callback.sampler for callback in reversed([*callbacks]) if hasattr(callback, "sampler")), None)


def sampler_from_config(config: Any) -> Sampler:
    """Builds the sampler that a checkpoint describes in the form of `sampler_to_config`.

    A checkpoint chooses neither code nor files: classes are looked up by name among those of this package, and their
    arguments are numbers, words that the class knows, lists of them and such descriptions. Raises UserError for
    anything else; the user alone names a guide, a drafter or a corpus.
    """
    return build(config, Sampler)
