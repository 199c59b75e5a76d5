"""The contract of samplers: prompts in, answers out, and what a checkpoint remembers of its sampler."""

import inspect
import json
import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, fields
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dllm_var.errors import UserError
from dllm_var.files import fits
from dllm_var.model.config import TransformerConfig
from dllm_var.model.transformer import Transformer
from dllm_var.sampling.captured import release
from dllm_var.sampling.recording import RecordedStep, Recording, replay_of
from dllm_var.sampling.stopping import StopStrings
from dllm_var.text.tokenizer import Tokenizer
from dllm_var.view import frame

OnBlock = Callable[[int, list[int]], None]
OnAnswer = Callable[[int, "Generation"], None]
OnStep = Callable[[int, RecordedStep], None]

DECODING = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]  # attention on a GPU

_PACKAGE = "dllm_var.sampling."
_PLAIN = str | int | float | bool | None
_OWN: "dict[str, type[Configurable]]" = {}  # this package's samplers and policies: all that a checkpoint may name


class Configurable:
    """A sampler or policy: configs name it by `class_path`, and it keeps its arguments as attributes."""

    owner = ""  # of a setting, in messages; the class's name when empty

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if cls.is_own() and not cls.__name__.startswith("_"):
            _OWN[cls.__name__] = cls

    @classmethod
    def is_own(cls) -> bool:
        """Whether the class is this package's."""
        return cls.__module__.startswith(_PACKAGE)

    def check_range(self, low: float, high: float, *names: str) -> None:
        """Raises UserError for a setting outside [low, high]; None passes."""
        for name in names:
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                self.refuse(name, f"at least {low}" if high == math.inf else f"in [{low}, {high}]")

    def check_words(self) -> None:
        """Raises UserError for a setting that is none of the words in its `Literal` annotation."""
        for one in fields(self):  # type: ignore[arg-type]  # every subclass is a dataclass
            if get_origin(one.type) is Literal and not fits(getattr(self, one.name), one.type):
                self.refuse(one.name, " or ".join(get_args(one.type)))

    def refuse(self, name: str, allowed: str) -> NoReturn:
        raise UserError(f"{self.owner or type(self).__name__}.{name} must be {allowed}, got {getattr(self, name)}")


@dataclass
class Request:
    """The wishes of the caller of `generate`, and the way of tokens and answers back to the caller."""

    max_new_tokens: int | None = None  # longest answer, instead of the sampler's own limit
    suppressed: tuple[int, ...] = ()  # token ids that are never produced; the mask token never is
    tokenizer: Tokenizer | None = None  # the model's, when known; a second model must have the same
    stop: StopStrings | None = None  # finds the texts that end an answer
    on_block: OnBlock | None = None
    on_answer: OnAnswer | None = None
    check: Callable[[], None] = lambda: None  # raises when the model's predictions were not numbers
    context: int | None = None  # tokens of the longest prompt and its answer, when prompts enter a running engine
    log_probabilities: bool = False  # whether answers get those of their tokens
    records: bool = False  # whether answers get the steps that led to them
    on_step: OnStep | None = None  # called with each of these, too
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
    # For a notebook, which shows texts.
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
        left_out = {"prompt_length"} if self.drafted else {"prompt_length", "drafted", "accepted"}
        if self.log_probabilities is None:
            left_out.add("log_probabilities")
        left_out |= {"steps", "prompt", "tokenizer"}
        others = {name: value for name, value in vars(self).items() if name not in {*line, *left_out}}
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
            wishes = (max_new_tokens, tuple(suppress), known, strings, on_block, on_answer, check)
            record = record or on_step is not None
            request = Request(*wishes, log_probabilities=log_probabilities or record, records=record, on_step=on_step)
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


@contextmanager
def without_training_modes(transformer: Transformer) -> Iterator[None]:
    """Switches off what is for training only: the training mode, mixed precision, compiled blocks, cuDNN's attention.

    Decoding runs in the type of the weights, which is also the cache's. Compiled blocks would be compiled again for
    every shape that decoding meets, and cuDNN makes a plan for each, in tens of milliseconds.
    """
    kind = transformer.embedding.weight.device.type
    was_training = transformer.training
    if was_training:  # visiting every module takes a noticeable part of a short answer's time
        transformer.eval()
    try:
        eager = torch.compiler.set_stance("force_eager") if transformer.compiled else nullcontext()
        with torch.autocast(kind, enabled=False), eager, sdpa_kernel(DECODING) if kind == "cuda" else nullcontext():
            yield
    finally:
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


def last_sampler(callbacks: Iterable[Any]) -> Sampler | None:
    """Returns the sampler of the last callback that has one: how the model in training is meant to be decoded."""
    return next((callback.sampler for callback in reversed([*callbacks]) if hasattr(callback, "sampler")), None)


def sampler_to_config(sampler: Any) -> dict[str, Any] | None:
    """Returns `{"class_path": ..., "init_args": {...}}` of a sampler or policy, None for what cannot be described.

    The class must keep its arguments as attributes of the same name, as dataclasses do: plain values, lists of them,
    policies. The path is the shortest that names the class, so that a checkpoint outlives a move of its file.
    """
    kind = type(sampler)
    if not issubclass(kind, Configurable):
        return None
    arguments: dict[str, Any] = {}
    for name, parameter in inspect.signature(kind).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) or not hasattr(sampler, name):
            return None
        value = getattr(sampler, name)
        value = list(value) if isinstance(value, tuple) else value
        described = sampler_to_config(value) if isinstance(value, Configurable) else None
        if described is None and not fits(value, _PLAIN | list[_PLAIN]):
            return None
        arguments[name] = described or value
    parts = kind.__module__.split(".")
    packages = [".".join(parts[:length]) for length in range(1, len(parts) + 1)]
    exporting = (p for p in packages if getattr(sys.modules.get(p), kind.__qualname__, None) is kind)
    return {"class_path": f"{next(exporting, kind.__module__)}.{kind.__qualname__}", "init_args": arguments}


def sampler_from_config(config: Any) -> Sampler:
    """Builds the sampler that a checkpoint describes in the form of `sampler_to_config`.

    A checkpoint chooses neither code nor files: classes are looked up by name among those of this package, and their
    arguments are numbers, words that the class knows, lists of them and such descriptions. Raises UserError for
    anything else; the user alone names a guide, a drafter or a corpus.
    """
    return _build(config, Sampler)


def _build(config: Any, expected: type[Any]) -> Any:
    described = isinstance(config, dict) and "class_path" in config and set(config) <= {"class_path", "init_args"}
    if not described or not isinstance(config.get("init_args"), dict | None):
        raise UserError("the checkpoint's sampler is not described by class_path and init_args: pass --sampler")
    path = str(config["class_path"])
    kind = _OWN.get(path.rpartition(".")[2])
    if kind is None or inspect.isabstract(kind) or not path.startswith(_PACKAGE):
        raise UserError(f"the checkpoint asks for {path}, not a part of dllm_var: if you trust it, pass --sampler")
    if not issubclass(kind, expected):
        raise UserError(f"the checkpoint's sampler is damaged: {path} is no {expected.__name__}; pass --sampler")
    given, types = config.get("init_args") or {}, get_type_hints(kind)
    arguments = {name: _argument(kind.__name__, name, value, types.get(name)) for name, value in given.items()}
    try:
        return kind(**arguments)
    except TypeError as error:  # a setting is missing, or may not be given
        raise UserError(f"cannot build the checkpoint's sampler {path}: {error}") from error


def _argument(owner: str, name: str, value: Any, annotation: Any) -> Any:
    alternatives = get_args(annotation) or (annotation,)
    kinds = [one for one in alternatives if isinstance(one, type) and issubclass(one, Configurable)]
    if isinstance(value, dict) and kinds:
        return _build(value, kinds[0])
    if isinstance(value, str) and str in alternatives:
        raise UserError(
            f"the checkpoint's sampler {owner} names {name} {value!r}, and a checkpoint may not name other files: name "
            f"it yourself, with --sampler {_PACKAGE}{owner} --sampler.{name} PATH and the sampler's other settings"
        )
    if not fits(value, annotation):
        raise UserError(f"the checkpoint's sampler is damaged: {owner} cannot have {name}={value!r}")
    return value
