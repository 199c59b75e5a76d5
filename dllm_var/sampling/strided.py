"""Introspective strided decoding: a causal model drafts behind its own text and verifies its drafts (2604.11035)."""

import math
from dataclasses import KW_ONLY, dataclass, field

import torch
from torch import Tensor

from dllm_var.model.transformer import Transformer
from dllm_var.objectives.base import KeyedNoise
from dllm_var.sampling.base import Request, special_ids
from dllm_var.sampling.captured import reach_of
from dllm_var.sampling.drawing import draw, keep_likely, log_probabilities
from dllm_var.sampling.engine import Batch, Engine, EngineSampler, Row

DRAFTED = "draft_probabilities"  # in the engine's state: what the drafts of each slot were drawn from [slots, masks, V]
NO_DRAFT = -1
WIDTH_MULTIPLE = 16  # of the tokens of a step that is captured
TINY = 1e-300  # the least chance whose logarithm is taken
UNREAD = 0  # group of a window's text: its unread tokens and its drafts; those of masks are 1, 2, ..., of padding -1


@dataclass(eq=False)
class StridedRow(Row):
    tokens: list[int] = field(default_factory=list)  # the prompt and the answer so far
    drafts: list[int] = field(default_factory=list)  # tokens that may follow
    chances: list[float] = field(default_factory=list)  # of each draft, that it and all before it are accepted


@dataclass
class Window:
    """What a forward reads of a row: unread tokens, drafts, then a group of masks for each place that has one."""

    tokens: list[tuple[int, int, int, int]]  # id, place in the text behind the cache, place of its context's end, group
    stops: list[tuple[int, int, int]]  # places where accepting may stop: where, the draft behind it, its first mask
    masks: list[int]  # how many masks the stop has


class StridedEngine(Engine[StridedRow]):
    """Rows `text | drafts | masks behind the text | masks behind draft 1 | masks behind draft 2 ...`.

    The cache holds all of a row's text but its newest tokens. A forward reads these and the drafts, which it keeps as
    far as they are accepted. Behind each place where accepting may stop it reads masks, which stand in the text where
    the next tokens will and do not see the masks of other places: their predictions are the next drafts.
    """

    sampler: "StridedSampler"
    row_class = StridedRow
    free_share = 0.25  # prompts enter several at a time: a prefill costs as much as a step
    constant_shape = True

    def __init__(
        self, sampler: "StridedSampler", model: Transformer, prompts: list[list[int]], request: Request
    ) -> None:
        special_ids(model)
        slack = sampler.stride * (sampler.stride + 1) + WIDTH_MULTIPLE
        super().__init__(sampler, model, prompts, request, slack)
        self.cache = self.add_cache(model)
        self.masks = sampler.stride - 1  # most of a group
        self.offsets = self.lasting("offsets", lambda: torch.arange(self.masks, device=self.device))
        if sampler.temperature > 0:
            shape = (len(self.rows), self.masks, model.lm_head.out_features)
            self.state[DRAFTED] = self.lasting("drafted", lambda: torch.zeros(shape, device=self.device))

    def start(self, slot: int) -> None:
        self.rows[slot].tokens = [*self.prompts[self.rows[slot].index]]

    def forward(self, batch: Batch[StridedRow]) -> None:
        """Verifies each row's drafts, adds what is accepted and one token more, and drafts anew."""
        for row in batch.rows:
            row.nfe += row.index >= 0
        windows = [self._window(row) for row in batch.rows]
        longest, most = (max(map(len, parts)) for parts in zip(*((w.tokens, w.stops) for w in windows), strict=True))
        arena = self.arena_for(batch, self.sampler.stride)
        if arena is not None:
            longest, most = -(-longest // WIDTH_MULTIPLE) * WIDTH_MULTIPLE, self.sampler.stride
        lengths = self.cache.lengths if batch.index is None else self.cache.lengths[batch.index]
        table = torch.tensor([w.tokens + [(self.mask_id, 0, 0, -1)] * (longest - len(w.tokens)) for w in windows])
        table[:, :, 1] += lengths[:, None]  # places become rotary positions
        stops = torch.tensor([w.stops + [(0, NO_DRAFT, 0)] * (most - len(w.stops)) for w in windows])
        keys = torch.tensor([row.key + row.nfe for row in batch.rows])
        numbers = torch.cat((keys[:, None], lengths[:, None], stops.flatten(1), table.flatten(1)), dim=1)
        drafting = any(map(any, (window.masks for window in windows)))
        if arena is not None:
            reach = reach_of(int(lengths.max()) + longest, self.capacity)
            constants = reach, self.request.log_probabilities
            said = arena.run(lambda given: self._step(batch, given, most, reach), numbers, *constants)
        else:
            counts = torch.tensor([len(window.tokens) for window in windows])
            said = self._step(batch, numbers.to(self.device), most, counts, drafting).tolist()  # the one wait
        self._take(batch, windows, most, said)

    def _step(
        self, batch: Batch[StridedRow], numbers: Tensor, most: int, opens: int | Tensor, drafting: bool = True
    ) -> Tensor:
        """Reads every row's window, of at most `most` stops, verifies its drafts and drafts anew.

        `numbers` [R, 2 + 3 * most + 4 * L] are the number of a row's draws, its cached tokens, its window's stops and
        tokens. `opens` are the real tokens of each window [R], on the host; or the keys that a step of constant shape
        reads. Returns how many drafts are accepted, the token behind them, the new drafts and their chances, and if
        they are wanted the log-probabilities of the accepted tokens [R, most], all in one row of numbers.
        """
        heads, stops, table = numbers.split((2, 3 * most, numbers.size(1) - 2 - 3 * most), dim=1)
        (keys, start), (where, drafts, first) = heads.unbind(1), stops.unflatten(1, (-1, 3)).unbind(2)  # [R], [R, K]
        tokens, positions, context, group = table.unflatten(1, (-1, 4)).unbind(2)  # [R, L]
        longest = tokens.size(1)
        order = torch.arange(longest, device=self.device)
        in_group = (group[:, None] == group[:, :, None]) & (order <= order[:, None])
        seen = in_group | ((group == UNREAD)[:, None] & (order <= context[:, :, None]))
        if isinstance(opens, int):
            self.cache.open_constant(start[:, None] + order, None, opens, positions, seen)
        else:
            self.cache.open(longest, opens, batch.index, positions=positions, seen=seen)
        hidden = self.model.hidden_states(tokens, cache=self.cache)
        logits = self._logits(hidden, where)
        count, following = self._verify(logits, drafts, keys, batch)
        found = [count[:, None], following[:, None]]
        if drafting:
            of_stop = first.gather(1, count[:, None]) + self.offsets  # [R, masks], also where the stop has fewer
            found += self._draft(self._logits(hidden, of_stop.clamp_max(longest - 1)), keys, batch)
        if self.request.log_probabilities:
            is_draft = torch.arange(drafts.size(1), device=self.device) < count[:, None]
            added = torch.where(is_draft, drafts, following[:, None])
            found.append(log_probabilities(logits, added).double())
        return torch.cat(found, dim=1)

    def _window(self, row: StridedRow) -> Window:
        """Lays out what the next forward reads of a row."""
        if row.index < 0:
            return Window([(self.mask_id, 0, 0, UNREAD)], [(0, NO_DRAFT, 0)], [0])
        text = [*row.tokens[len(row.tokens) - row.pending :], *row.drafts]
        window = Window([(token, place, place, UNREAD) for place, token in enumerate(text)], [], [])
        left = row.limit - (len(row.tokens) - row.prompt_length)
        at_least = [1.0, *row.chances, 0.0]
        exactly = [now - then for now, then in zip(at_least[:-1], at_least[1:], strict=True)]  # n drafts are accepted
        needed = min(self.sampler.least_chance, max(exactly))
        for n, chance in enumerate(exactly):
            place = row.pending - 1 + n
            # Accepting n drafts gives n + 1 tokens, and the next forward gives the last one without a draft.
            masks = min(self.masks, left - n - 2) if chance >= needed else 0
            if masks < 0 or (n and row.drafts[n - 1] in self.terminators):
                masks = 0
            draft = row.drafts[n] if n < len(row.drafts) else NO_DRAFT
            window.stops.append((place, draft, len(window.tokens) if masks else 0))
            window.masks.append(masks)
            window.tokens += [(self.mask_id, place + 1 + k, place, n + 1) for k in range(masks)]
        return window

    def _logits(self, hidden: Tensor, places: Tensor) -> Tensor:
        """Returns the logits [R, K, V] at places [R, K] of a forward [R, L, hidden]; -inf for banned tokens."""
        chosen = hidden.gather(1, places[:, :, None].expand(-1, -1, hidden.size(2)))
        return self.model.lm_head(chosen).float().index_fill_(2, self.banned, -torch.inf)

    def _probabilities(self, logits: Tensor) -> Tensor:
        """Returns what tokens are drawn from, of the same shape as their logits."""
        settings = self.sampler
        likely = keep_likely(logits.flatten(0, 1), settings.temperature, settings.top_k, settings.top_p)
        return (likely / settings.temperature).softmax(dim=-1).view_as(logits)

    def _verify(self, logits: Tensor, drafts: Tensor, keys: Tensor, batch: Batch[StridedRow]) -> tuple[Tensor, Tensor]:
        """Returns how many `drafts` [R, K] of each row are accepted [R], and the token behind them [R].

        The logits [R, K, V] say what the model itself puts where the drafts are. Drawn drafts are accepted such that
        tokens are distributed as the model says (speculative sampling, arXiv 2211.17192, theorem 1).
        """
        settings = self.sampler
        if settings.temperature == 0:
            own = logits.argmax(dim=-1)
            count = (own == drafts).long().cumprod(dim=1).sum(dim=1)
            return count, own.gather(1, count[:, None])[:, 0]
        wanted = self._probabilities(logits)
        offered = torch.zeros_like(wanted)
        known = self.state[DRAFTED] if batch.index is None else self.state[DRAFTED][batch.slots]
        offered[:, : self.masks] = known[:, : wanted.size(1)]
        offered.masked_fill_((drafts == NO_DRAFT)[:, :, None], 0)
        of_draft = drafts.clamp_min(0)[:, :, None]
        chance, offer = wanted.gather(2, of_draft)[..., 0], offered.gather(2, of_draft)[..., 0]
        uniform = KeyedNoise(settings.seed).uniform(keys, drafts.size(1), stream=6)
        accepted = (uniform * offer < chance) & (drafts != NO_DRAFT)
        count = accepted.long().cumprod(dim=1).sum(dim=1)
        here = count[:, None, None].expand(-1, 1, wanted.size(2))
        wanted, offered = wanted.gather(1, here)[:, 0], offered.gather(1, here)[:, 0]  # where accepting stopped
        rest = (wanted - offered).clamp_min(0)
        rest = torch.where(rest.sum(dim=1, keepdim=True) > 0, rest, wanted)  # equal but for rounding
        return count, draw(rest.log(), keys * settings.stride + self.masks, 1.0, 0, 1.0, settings.seed)

    def _draft(self, logits: Tensor, keys: Tensor, batch: Batch[StridedRow]) -> tuple[Tensor, Tensor]:
        """Returns drafts [R, masks] from the masks' logits, and the chance of each that all up to it are accepted.

        Chances are doubles, beside which any token id keeps its value.
        The chance is guessed from the largest probabilities alone. If it depended on the tokens that were drawn, those
        that are verified because of it would not be distributed as drawn.
        """
        settings = self.sampler
        if settings.temperature == 0:
            top, tokens = logits.max(dim=-1)
            return tokens, (top - logits.logsumexp(dim=-1)).exp().double().cumprod(dim=1)
        probabilities = self._probabilities(logits)
        self.state[DRAFTED][slice(None) if batch.index is None else batch.slots] = probabilities
        numbers = (keys * settings.stride)[:, None] + self.offsets
        tokens = settings.draw(logits.flatten(0, 1), numbers.flatten()).view_as(numbers)
        return tokens, probabilities.amax(dim=-1).double().cumprod(dim=1)

    def _take(self, batch: Batch[StridedRow], windows: list[Window], most: int, said: list[list[float]]) -> None:
        """Adds to each row what is accepted, takes its new drafts, and ends it when it is complete."""
        kept, cells, written, nfe, known = [], list[int](), list[int](), list[int](), list[float]()
        told: list[tuple[int, int, str | None]] = []
        for slot, row, window, numbers in zip(batch.slots, batch.rows, windows, said, strict=True):
            count, following, *rest = map(int, numbers[: 2 + self.masks])
            kept.append(row.pending + count if row.index >= 0 else 0)
            if row.index < 0:
                continue
            row.drafted += min(count + 1, len(row.drafts))
            row.accepted += count
            new = [*row.drafts[:count], following]
            row.drafts, row.chances = rest[: window.masks[count]], numbers[2 + self.masks :][: window.masks[count]]
            sure, of_sure = self._sure_drafts(row)
            new += sure
            row.pending = len(new) - count
            end = next((n for n, token in enumerate(new) if token in self.terminators), None)
            start = len(row.tokens)
            row.tokens += new[:end]
            stop = len(row.tokens)
            cells += range(slot * self.capacity + start, slot * self.capacity + stop)
            written += row.tokens[start:]
            nfe += [row.nfe] * (stop - start)
            if self.request.log_probabilities:
                of_verified = numbers[len(numbers) - most :][: count + 1]
                known += [*of_verified, *of_sure][: stop - start]
            done = stop - row.prompt_length == row.limit
            told.append((slot, stop, "eos" if end is not None else "length" if done else None))
        self.cache.advance(torch.tensor(kept), batch.index)
        where, what, when = torch.tensor((cells, written, nfe), dtype=torch.long, device=self.device)
        self.canvas.put_(where, what)
        self.committed_at.put_(where, when)
        if self.request.log_probabilities:
            self.log_probabilities.put_(where, torch.tensor(known, dtype=torch.float, device=self.device))
        for slot, stop, reason in told:
            self.tell(slot, stop, reason)

    def _sure_drafts(self, row: StridedRow) -> tuple[list[int], list[float]]:
        """Drops drafts that are not worth verifying; takes out those that need not be verified.

        Returns the latter and their log-probabilities.
        """
        worth = sum(chance >= self.sampler.least_chance for chance in row.chances)
        worth = next((n + 1 for n, token in enumerate(row.drafts[:worth]) if token in self.terminators), worth)
        trust = math.inf if self.sampler.trust is None or self.sampler.temperature else self.sampler.trust
        sure = sum(chance >= trust for chance in row.chances[:worth])
        taken, row.drafts = row.drafts[:sure], row.drafts[sure:worth]
        logarithms = [math.log(max(chance, TINY)) for chance in row.chances[:sure]]  # of each draft and all before it
        of_taken = [now - before for now, before in zip(logarithms, [0.0, *logarithms], strict=False)]
        of_sure = max(row.chances[sure - 1], 1e-9) if sure else 1.0
        row.chances = [chance / of_sure for chance in row.chances[sure:worth]]
        return taken, of_taken


@dataclass(eq=False)
class StridedSampler(EngineSampler):
    """Decodes a causal model that was trained with `IntrospectiveStride`, several tokens in a forward.

    A forward verifies the drafts of the last one, from left to right, and drafts anew behind every place where it may
    stop accepting. At temperature 0 the text is what the model says one token at a time, token for token; drawn text
    has the same distribution. (I-DLM, arXiv 2604.11035. Its sampler drafts behind the last place alone, so that a
    forward without drafts follows each rejection.)

    Args:
        stride: Most tokens that a forward verifies and adds; a draft has one less.
        least_chance: A draft is verified, and masks are put behind a place, only where the chance that this helps is
            at least this, judged by the model's own probabilities. 0 verifies and drafts everywhere, which is best
            where `stride` squared tokens cost no more than one, as on a GPU at batch 1.
        trust: At temperature 0, drafts are committed without verification while the chance that all of them are right
            is at least this. Faster, but the text may differ from the model's own. None verifies all.
    """

    engine = StridedEngine
    causal = True

    stride: int = 8
    _: KW_ONLY
    least_chance: float = 0.0
    trust: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_range(2, math.inf, "stride")
        self.check_range(0, 1, "least_chance", "trust")
