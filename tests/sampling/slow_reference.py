"""Block diffusion the slow and obvious way: one row, no cache object, Python loops, an explicit attention mask.

Then the rules of policies, each for one row as its paper or released code states it.
"""

from __future__ import annotations

import math

import torch

from dllm_var.model import Transformer


def generate(
    model: Transformer,
    prompt: list[int],
    block_length: int,
    limit: int,
    choose,
    terminator_last: bool = False,
    kv_commit: str = "joint_next",
) -> tuple[list[int], str, int]:
    """Returns tokens, finish reason and number of forwards.

    Every forward computes the keys of the prompt and of each finished block again, each the way it was made when it
    was committed: under `joint_next` with the next block behind it as masks, under `alone` with nothing behind it,
    under `last_step` as it stood before its last commits; left to right in a model with causal context.
    """
    mask, ends = model.config.mask_id, set(model.config.terminator_ids)
    finished: list[list[int]] = [list(prompt)]  # prompt, then finished blocks
    as_run = [list(prompt)]  # the same, as they stood at their last forward
    nfe, decoded = 0, 0
    with torch.no_grad():
        while True:
            width = min(block_length, limit - decoded)
            block = [mask] * width
            if kv_commit == "alone":
                nfe += 1
            while mask in block:
                nfe += 1
                before, kept = list(block), as_run if kv_commit == "last_step" else finished
                logits = _forward_block(model, kept, block, block_length, limit, len(prompt), kv_commit)
                logits[:, mask] = -torch.inf
                probs = logits.softmax(-1)
                confidence, predicted = probs.max(-1)
                masked = [j for j in range(width) if block[j] == mask]
                wanted = [j for j in masked if choose(float(confidence[j]))]
                if terminator_last:
                    sure = [j for j in wanted if int(predicted[j]) in ends]
                    barrier = min(sure, default=width)
                    plain = [j for j in wanted if j < barrier]
                    still_open = [j for j in masked if j not in plain and j < barrier]
                    wanted = plain + ([barrier] if sure and not still_open else [])
                    first_end = min((j for j in masked if int(predicted[j]) in ends), default=width)
                    allowed = [j for j in masked if j < first_end or j == masked[0]]
                else:
                    allowed = masked
                if not wanted:
                    wanted = [max(allowed, key=lambda j: (float(confidence[j]), -j))]
                for j in wanted:
                    block[j] = int(predicted[j])
                for j in range(width):
                    if block[j] == mask:
                        break
                    if block[j] in ends:
                        return [t for seg in finished[1:] for t in seg] + block[:j], "eos", nfe
            decoded += width
            finished.append(block)
            as_run.append(before)
            if decoded >= limit:
                return [t for seg in finished[1:] for t in seg], "length", nfe


def _forward_block(model, finished, block, block_length, limit, prompt_length, kv_commit):
    """Logits of the active block."""
    keys = prefix_keys(model, finished, block_length, limit, prompt_length, kv_commit)
    start = sum(map(len, finished))
    hidden, _ = forward(model, block, range(start, start + len(block)), keys)
    return model.lm_head(hidden)[0].float()


def prefix_keys(model, finished, block_length, limit, prompt_length, kv_commit="joint_next"):
    """Keys and values of every earlier segment, made the way they were when it was committed."""
    mask = model.config.mask_id
    keys: list[list[tuple[torch.Tensor, torch.Tensor]]] = []
    position = 0
    segments = list(finished)
    for k, segment in enumerate(segments):
        done = sum(map(len, segments[: k + 1])) - prompt_length
        nothing = kv_commit == "alone" or (kv_commit == "last_step" and k > 0)
        behind = [] if nothing else [mask] * min(block_length, limit - done)
        tokens, sees = segment + behind, None
        if model.config.causal_context and not (kv_commit == "last_step" and k > 0):
            sees = [[j <= i for j in range(len(tokens))] for i in range(len(tokens))]
        _, segment_keys = forward(model, tokens, range(position, position + len(tokens)), keys, sees)
        keys.append([(key[:, :, : len(segment)], value[:, :, : len(segment)]) for key, value in segment_keys])
        position += len(segment)
    return keys


def forward(model, tokens, positions, keys, sees=None):
    """Hidden states of `tokens` on top of frozen keys, and their own keys, with attention written out.

    `sees[i][j]` says whether token i sees token j; all of them when null.
    """
    length = len(tokens)
    cos, sin = model.rotary(torch.tensor([list(positions)]), max(positions) + 1)
    x = model.embedding(torch.tensor(tokens)[None])
    made = []
    for i, layer in enumerate(model.layers):
        attention = layer.self_attn
        normed, shape = layer.input_layernorm(x), (1, length, -1, attention.head_dim)
        q, k, v = (project(normed).view(shape) for project in (attention.q_proj, attention.k_proj, attention.v_proj))
        half = attention.head_dim // 2
        c, s = cos[..., :half], sin[..., half:]

        def turn(z, c=c, s=s, half=half):
            a, b = z[..., :half], z[..., half:]
            return torch.cat((a * c - b * s, b * c + a * s), dim=-1)

        q, k, v = turn(q).transpose(1, 2), turn(k).transpose(1, 2), v.transpose(1, 2)
        made.append((k, v))
        all_k = torch.cat([segment[i][0] for segment in keys] + [k], dim=2)
        all_v = torch.cat([segment[i][1] for segment in keys] + [v], dim=2)
        repeats = attention.num_heads // attention.num_kv_heads
        all_k, all_v = all_k.repeat_interleave(repeats, 1), all_v.repeat_interleave(repeats, 1)
        scores = q @ all_k.transpose(-1, -2) / attention.head_dim**0.5
        if sees is not None:
            scores[..., -length:].masked_fill_(~torch.tensor(sees), -torch.inf)
        weights = scores.softmax(-1)
        x = x + attention.o_proj((weights @ all_v).transpose(1, 2).reshape(1, length, -1))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return model.model.norm(x), made


class SlowPolicy:
    """One row's block: `step` changes its tokens, 0 where masked, by the logits [K, V] of a forward."""

    def __init__(self):
        self.steps = 0

    def step(self, tokens, logits):
        p = logits.softmax(-1)
        self.probability = p.tolist()
        self.best = p.argmax(-1).tolist()
        self.entropy = [-sum(x * math.log(x) for x in row if x > 0) for row in self.probability]
        self.margin = [float(top[0] - top[1]) for top in logits.topk(2).values]
        masks = [j for j, token in enumerate(tokens) if token == 0]
        commit, remask = self.choose(tokens, masks)
        for j in commit:
            tokens[j] = self.best[j]
        for j in remask:
            tokens[j] = 0
        self.steps += 1

    def surest(self, masks):
        return sorted(masks, key=lambda j: self.entropy[j])


class SlowEntropyThreshold(SlowPolicy):
    """dParallel: in order of entropy, the first one and all further ones that are not above the threshold."""

    def __init__(self, threshold):
        super().__init__()
        self.threshold = threshold

    def choose(self, tokens, masks):
        first, *others = self.surest(masks)
        return [first, *(j for j in others if not self.entropy[j] > self.threshold)], []


class SlowEntropyBounded(SlowPolicy):
    """EB-Sampler: the largest set in order of entropy whose sum without its largest is at most gamma."""

    def __init__(self, gamma):
        super().__init__()
        self.gamma = gamma

    def choose(self, tokens, masks):
        ordered = self.surest(masks)
        for size in range(len(ordered), 0, -1):
            chosen = [self.entropy[j] for j in ordered[:size]]
            if sum(chosen) - max(chosen) <= self.gamma:
                return ordered[:size], []
        raise AssertionError("one position is always within the bound")


class SlowCoherentCandidates(SlowPolicy):
    """CCD-DS as released, over one block: two buffers of the last step, of positions and of predictions."""

    def __init__(self, count, warmup):
        super().__init__()
        self.count, self.warmup = count, warmup
        self.size, self.buffer, self.history = 1, [], []

    def choose(self, tokens, masks):
        if len(masks) <= 0.1 * len(tokens):
            self.size = 1
        if self.steps < self.warmup - 1 or self.steps == 0:
            self.size = 1
        else:
            self.size = min(self.size + 1, self.count + 4 * self.count)
        ordered = self.surest(masks)
        commit = ordered[: self.count]
        if self.steps >= self.warmup and any(j in self.buffer for j in commit):
            matching = [j for j in ordered[: self.size] if j in self.buffer and self.best[j] == self.history[j]]
            if len(matching) >= self.count:
                commit = matching
        self.buffer = [j for j in ordered if j not in commit][: self.size]
        self.history = self.best
        return commit, []


class SlowSaber(SlowPolicy):
    """Saber: the paper's sets, the released code's numbers."""

    def __init__(self, count):
        super().__init__()
        self.count, self.when_committed, self.before = count, {}, {}

    def choose(self, tokens, masks):
        done = [j for j, token in enumerate(tokens) if token != 0]
        now = {j: self.probability[j][tokens[j] or self.best[j]] for j in range(len(tokens))}
        bar = sum(self.when_committed[j] for j in done) / len(done) if done else 1.0
        ordered = sorted(masks, key=lambda j: -now[j])
        commit = ordered[: max(self.count, sum(now[j] > bar for j in masks))]
        number = max(self.count, len(commit))
        self.when_committed |= {j: now[j] for j in commit}
        remask = []
        if len(commit) < len(masks):
            amount = min(max(self.count // 2, math.ceil(number / 8)), number - 1)
            remask = sorted(done, key=lambda j: now[j] - self.before[j])[:amount]
        self.before = now
        return commit, remask


class SlowEarlyExit(SlowPolicy):
    """Prophet and SchED, which asks for calm, over the masked positions; before that the most confident, one a step."""

    def __init__(self, threshold, calm=False):
        super().__init__()
        self.threshold, self.calm, self.history = threshold, calm, None

    def choose(self, tokens, masks):
        mean = sum(self.margin[j] for j in masks) / len(masks)
        changed = self.history is None or any(self.best[j] != self.history[j] for j in masks)
        self.history = self.best
        if mean >= self.threshold(1 - len(masks) / len(tokens)) and not (self.calm and changed):
            return masks, []
        return [max(masks, key=lambda j: self.probability[j][self.best[j]])], []
