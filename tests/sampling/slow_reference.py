"""Block diffusion the slow and obvious way: one row, no cache object, Python loops, an explicit attention mask."""

from __future__ import annotations

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
    for i, block in enumerate(model.blocks):
        attention = block.attention
        qkv = attention.qkv(block.attention_norm(x)).view(1, length, -1, attention.head_dim)
        q, k, v = qkv.split((attention.num_heads, attention.num_kv_heads, attention.num_kv_heads), dim=2)
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
        x = x + attention.out((weights @ all_v).transpose(1, 2).reshape(1, length, -1))
        x = x + block.mlp(block.mlp_norm(x))
    return model.norm(x), made
