"""Likelihoods, held to models whose probabilities are known and to plain loops."""

from itertools import product

import pytest
import torch

from dllm_var.errors import UserError
from dllm_var.evaluation.likelihood import Likelihood
from dllm_var.model import TransformerConfig
from dllm_var.sampling import BlockDiffusionSampler, ConfidenceThreshold
from tests.sampling.tiny_models import ENDS, MASK, PROMPTS, random_model

ANSWERS = [[7], [5, 6, 7, 8, 9, 10, 11, 12, 13], [9, 9], [], [6, 5, 18], [10, 11, 12, 13, 14], [8] * 12]
PAIRS = list(zip(PROMPTS, ANSWERS, strict=True))


class Joint:
    """A model that knows the joint distribution of texts of `length` zeros and ones behind one token of context.

    What it predicts are the true conditionals, so that every order of decoding has the text's own probability and the
    bound is tight.
    """

    def __init__(self, length):
        self.config = TransformerConfig(vocab_size=3, mask_id=2, terminator_ids=[0])
        self.texts = torch.tensor(list(product((0, 1), repeat=length)))
        self.probability = torch.rand(len(self.texts), generator=torch.Generator().manual_seed(3)).softmax(dim=0)
        self.probability = self.probability**4 / (self.probability**4).sum()
        self.embedding = torch.nn.Embedding(3, 3)
        self.lm_head = torch.nn.Linear(3, 3, bias=False)
        self.lm_head.weight = torch.nn.Parameter(torch.eye(3))

    def hidden_states(self, tokens, segment_ids=None, asked=None):
        if segment_ids is not None:  # padding of a shorter row, which it does not see
            tokens = tokens.masked_fill(segment_ids == 1, 2)
        answers = torch.nn.functional.pad(tokens[:, 1:], (0, self.texts.size(1) + 1 - tokens.size(1)), value=2)
        fits = ((answers[:, None] == self.texts) | (answers[:, None] == 2)).all(dim=2)  # [B, texts]
        weight = fits * self.probability
        one = torch.einsum("bt,tl->bl", weight, self.texts.float()) / weight.sum(dim=1, keepdim=True)
        logits = torch.stack((1 - one, one, torch.zeros_like(one)), dim=-1).clamp_min(1e-30).log()
        return torch.cat((logits[:, :1], logits), dim=1)[:, : tokens.size(1)].flatten(0, 1)[asked]


@pytest.mark.parametrize("block_length", [0, 1, 2, 3])
def test_the_bound_is_exact_where_every_choice_of_hidden_positions_is_taken(block_length):
    model = Joint(length=4)
    pairs = [([0], text.tolist()) for text in model.texts]
    scores = Likelihood(draws=15, batch_size=7, block_length=block_length)(model, pairs)
    assert torch.tensor([score.log_likelihood for score in scores]).exp().sum() == pytest.approx(1, abs=1e-5)
    for score, probability in zip(scores, model.probability, strict=True):
        assert score.log_likelihood == pytest.approx(float(probability.log()), abs=1e-5)


def test_the_estimate_converges_to_the_exact_log_likelihood():
    model = Joint(length=8)
    text = [1, 0, 0, 1, 1, 1, 0, 1]
    exact = float(model.probability[int("".join(map(str, text)), 2)].log())
    assert Likelihood(draws=255)(model, [([0], text)])[0].log_likelihood == pytest.approx(exact, abs=1e-4)
    scores = [
        Likelihood(draws=20, batch_size=64, seed=seed)(model, [([0], text)], decode=False)[0] for seed in range(400)
    ]
    estimates = torch.tensor([score.log_likelihood for score in scores], dtype=torch.float64)
    standard_error = float(estimates.std() / len(estimates) ** 0.5)
    assert 0 < standard_error < 0.05
    assert abs(float(estimates.mean()) - exact) < 4 * standard_error


def test_a_seed_fixes_every_digit_and_another_one_draws_anew():
    model = random_model()
    torch.manual_seed(1)
    first = Likelihood(draws=20, seed=3)(model, PAIRS)
    torch.manual_seed(2)  # no draw is torch's
    assert Likelihood(draws=20, seed=3)(model, PAIRS) == first
    other = Likelihood(draws=20, seed=4)(model, PAIRS)
    for (_, answer), score, anew in zip(PAIRS, first, other, strict=True):
        drawn = 2 ** len(answer) - 1 > 20  # shorter answers have every choice taken
        assert (score.log_likelihood != anew.log_likelihood) == drawn


@pytest.mark.parametrize("causal", [False, True])
def test_a_score_does_not_depend_on_batch_size_or_company(causal):
    model = random_model(causal=causal)
    everything = Likelihood(draws=20, batch_size=64)(model, PAIRS)
    for batch_size in (1, 3):
        scores = Likelihood(draws=20, batch_size=batch_size)(model, PAIRS)
        for score, other in zip(scores, everything, strict=True):
            assert score.log_likelihood == pytest.approx(other.log_likelihood, rel=1e-4, abs=1e-4)
            assert score.is_greedy == other.is_greedy
    alone = Likelihood(draws=20)(model, [PAIRS[1]])[0]
    assert alone.log_likelihood == pytest.approx(everything[1].log_likelihood, rel=1e-4)


def test_causal_scores_are_the_log_softmax_of_each_token():
    model = random_model(causal=True)
    scores = Likelihood(batch_size=3)(model, PAIRS)
    for (context, answer), score in zip(PAIRS, scores, strict=True):
        total, greedy = 0.0, True
        for place, token in enumerate(answer):
            logits = model(torch.tensor([context + answer[:place]]))[0, -1].double()
            total += float(logits.log_softmax(dim=-1)[token])
            greedy &= int(logits.argmax()) == token
        assert score.log_likelihood == pytest.approx(total, rel=1e-4, abs=1e-4)
        assert score.is_greedy == greedy


def test_token_shift_and_direct_computation_agree():
    """A Dream-like model, one token hidden at a time: L = 1 has one choice only."""
    model = random_model(token_shift=True)
    for context, _ in PAIRS:
        logits = model(torch.tensor([[*context, MASK]]))[0, -1].double()
        score = Likelihood()(model, [(context, [7])])[0]
        assert score.log_likelihood == pytest.approx(float(logits.log_softmax(dim=-1)[7]), rel=1e-4)


@pytest.mark.parametrize("canvas", [0, 4])
def test_greedy_is_what_a_plain_loop_decodes(canvas):
    model = random_model()
    pairs = []
    for context in PROMPTS:
        answer = [MASK] * 5
        while MASK in answer:
            tail = [MASK] * (-5 % canvas if canvas else 0)
            logits = model(torch.tensor([context + answer + tail]))[0, len(context) :].clone()
            logits[:, MASK] = -torch.inf
            best = logits.softmax(dim=-1).max(dim=-1)
            open_places = [place for place in range(5) if answer[place] == MASK]
            place = max(open_places, key=lambda place: float(best.values[place]))
            answer[place] = int(best.indices[place])
        wrong = [*answer[:2], (answer[2] - 5 + 1) % 13 + 5, *answer[3:]]
        pairs += [(context, answer), (context, wrong)]
    scores = Likelihood(draws=2, batch_size=4, canvas=canvas)(model, pairs)
    assert [score.is_greedy for score in scores] == [True, False] * len(PROMPTS)


def test_masks_behind_the_answer_are_seen():
    model = random_model()
    bare, canvas = (Likelihood(canvas=length)(model, [PAIRS[0]])[0].log_likelihood for length in (0, 4))
    context = PAIRS[0][0]
    logits = model(torch.tensor([[*context, *[MASK] * 4]]))[0, len(context)].double()
    assert canvas == pytest.approx(float(logits.log_softmax(dim=-1)[7]), rel=1e-4)
    assert bare != pytest.approx(canvas, rel=1e-3)


@pytest.mark.parametrize("token_shift", [False, True])
@pytest.mark.parametrize("block_length", [1, 4])
def test_a_causal_context_is_read_as_the_sampler_reads_it(block_length, token_shift):
    """What the sampler decodes from its cache, one token a forward, is greedy for a forward without any cache."""
    model = random_model(causal_context=True, token_shift=token_shift)
    with torch.no_grad():  # no terminator is ever likely, so that answers run into their limit
        model.lm_head.weight[list(ENDS)] = 0
    policy = ConfidenceThreshold(threshold=1.0)
    sampler = BlockDiffusionSampler(policy, block_length=block_length, max_new_tokens=8, terminator_last=False)
    answers = [answer.tokens for answer in sampler.generate(model, PROMPTS)]
    assert all(len(answer) == 8 for answer in answers)
    others = [[*answer[:6], answer[6] % 13 + 5, answer[7]] for answer in answers]
    assert all(other[6] != answer[6] for other, answer in zip(others, answers, strict=True))
    likelihood = Likelihood(draws=2, block_length=block_length, batch_size=5)
    right = likelihood(model, list(zip(PROMPTS, answers, strict=True)))
    wrong = likelihood(model, list(zip(PROMPTS, others, strict=True)))
    assert [score.is_greedy for score in right] == [True] * len(PROMPTS)
    assert not any(score.is_greedy for score in wrong)


@pytest.mark.parametrize("settings", [{"draws": 0}, {"batch_size": 0}, {"canvas": -1}, {"block_length": -1}])
def test_numbers_out_of_range_are_refused(settings):
    with pytest.raises(UserError, match="likelihood needs"):
        Likelihood(**settings)


def test_a_causal_context_needs_the_block_length():
    with pytest.raises(UserError, match="causal_context"):
        Likelihood()(random_model(causal_context=True), PAIRS)
