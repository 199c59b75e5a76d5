"""Stop strings, suppressed tokens, and answers told as their rows end: the same promises from every sampler."""

import pytest
import torch
from byte_tokenizer import write_byte_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from dllm_var.checkpoints.export import save_checkpoint_folder
from dllm_var.errors import UserError
from dllm_var.model import Transformer, TransformerConfig
from dllm_var.sampling import AutoregressiveSampler, BlockDiffusionSampler, ConfidenceThreshold, FixedLengthSampler
from dllm_var.sampling.diffuspec import DiffuSpecSampler
from dllm_var.sampling.freedave import FreeDaveSampler
from dllm_var.sampling.guided import GuidedSampler
from dllm_var.sampling.multi_block import MultiBlockSampler
from dllm_var.sampling.stopping import StopStrings
from dllm_var.sampling.wino import WinoSampler
from dllm_var.text.tokenizer import SpecialTokens, Tokenizer

LETTERS = [*"abcdefghijklmnop", "<pad>", "<mask>", "<eos>"]
PAD, MASK, EOS = 16, 17, 18
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9], [4], [10, 11]]
LIMITS = dict(max_new_tokens=24, batch_size=2)
SAMPLERS = {
    "block diffusion": lambda path: BlockDiffusionSampler(ConfidenceThreshold(0.2), block_length=4, **LIMITS),
    "fixed length": lambda path: FixedLengthSampler(
        ConfidenceThreshold(0.2), canvas_length=24, block_length=4, batch_size=2
    ),
    "autoregressive": lambda path: AutoregressiveSampler(**LIMITS),
    "FreeDave": lambda path: FreeDaveSampler(block_length=4, **LIMITS),
    "multi-block": lambda path: MultiBlockSampler(ConfidenceThreshold(0.2), block_length=4, blocks=3, **LIMITS),
    "WINO": lambda path: WinoSampler(threshold=0.2, shadow_threshold=0.1, block_length=4, **LIMITS),
    "guided": lambda path: GuidedSampler(path(causal=True), block_length=4, **LIMITS),
    "DiffuSpec": lambda path: DiffuSpecSampler(path(causal=False), shortest_draft=2, longest_draft=4, **LIMITS),
}


def letters(words=LETTERS):
    """A tokenizer whose tokens are these words, one behind the other without spaces."""
    backend = Backend(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<pad>"))
    backend.add_special_tokens(["<pad>", "<mask>", "<eos>"])
    backend.decoder = decoders.Fuse()
    return Tokenizer(backend, SpecialTokens(words.index("<mask>"), (words.index("<eos>"),), words.index("<pad>")))


def test_a_text_by_itself_is_one_prompt():
    model, tokenizer = random_model(), letters()
    sampler = BlockDiffusionSampler(block_length=4, **LIMITS)
    [alone] = sampler.generate(model, "kel", tokenizer=tokenizer)
    [listed] = sampler.generate(model, ["kel"], tokenizer=tokenizer)
    assert alone.tokens == listed.tokens
    with pytest.raises(UserError, match="list of prompts"):
        sampler.generate(model, [1, 2, 3], tokenizer=tokenizer)


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("kind", ["block diffusion", "autoregressive"])
def test_answers_are_decoded_under_trainer_deterministic(kind, deterministic):
    assert SAMPLERS[kind](None).generate(random_model(causal=kind == "autoregressive"), PROMPTS)
    assert torch.are_deterministic_algorithms_enabled()


def random_model(causal=False):
    torch.manual_seed(1)
    config = dict(hidden_size=32, num_layers=2, num_heads=4, vocab_size=len(LETTERS), mask_id=MASK, causal=causal)
    config |= dict(terminator_ids=[EOS], pad_id=PAD, initializer_range=0.2)
    return Transformer(TransformerConfig(**config)).eval()


def decode(sampler, suppress=(PAD,), **options):
    """Answers without padding tokens, which have no text."""
    model = random_model(causal=isinstance(sampler, AutoregressiveSampler | DiffuSpecSampler))
    return sampler.generate(model, PROMPTS, tokenizer=letters(), suppress=suppress, **options)


@pytest.fixture(scope="module", params=SAMPLERS)
def sampler(request, tmp_path_factory):
    """Each of the samplers; those with a second model find it in a folder."""

    def path(causal):
        return str(save_checkpoint_folder(tmp_path_factory.mktemp("second"), random_model(causal), letters()))

    return SAMPLERS[request.param](path)


def test_answers_end_before_the_first_stop_string(sampler):
    plain = decode(sampler)
    longest = max(plain, key=lambda answer: len(answer.tokens))
    stops = [longest.text[7:9], longest.text[12]]
    stopped = 0
    for answer, whole in zip(decode(sampler, stop=stops), plain, strict=True):
        ends = [at for stop in stops if (at := whole.text.find(stop)) >= 0]
        assert answer.text == (whole.text[: min(ends)] if ends else whole.text)
        assert answer.finish_reason == ("stop" if ends else whole.finish_reason)
        assert answer.tokens == whole.tokens[: len(answer.tokens)] and len(answer.tokens) == len(answer.text)
        assert answer.commit_steps == whole.commit_steps[: len(answer.tokens)]
        stopped += bool(ends)
    assert stopped


def test_nothing_is_decoded_behind_a_stop_string(sampler):
    whole = decode(sampler)[0]
    [answer, *_] = decode(sampler, stop=[whole.text[0]])
    assert answer.text == "" and answer.nfe < whole.nfe


def test_streamed_blocks_stop_with_the_answer(sampler):
    whole = decode(sampler)[0]
    seen = {}
    stop = StopStrings([whole.text[3:5]], letters())  # 4 tokens are a block: the stop string stands in two
    answers = decode(
        sampler,
        stop=stop.strings,
        on_block=lambda index, tokens: seen.setdefault(index, []).append(letters().decode(tokens)),
    )
    assert answers[0].text == whole.text[:3]
    for index, texts in seen.items():
        assert texts[-1] == answers[index].text
        assert all(answers[index].text.startswith(stop.settled(text)) for text in texts)


def test_suppressed_tokens_are_never_produced(sampler):
    favourites = sorted({token for answer in decode(sampler) for token in answer.tokens})[:5]
    answers = decode(sampler, suppress=[*favourites, EOS])
    assert not {token for answer in answers for token in answer.tokens} & {*favourites, MASK}
    assert {(answer.finish_reason, len(answer.tokens)) for answer in answers} == {("length", 24)}


def test_one_token_may_be_left(sampler):
    answers = decode(sampler, suppress=[token for token in range(len(LETTERS)) if token not in (3, MASK)])
    assert {answer.text for answer in answers} == {"d" * 24}


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"suppress": [99]}, "suppress has token id 99"),
        ({"suppress": [token for token in range(len(LETTERS)) if token != MASK]}, "suppress names every token"),
        ({"stop": [""]}, "stop string is empty"),
    ],
)
def test_mistakes_are_named(options, named):
    with pytest.raises(UserError, match=named):
        decode(BlockDiffusionSampler(), **options)


def test_stop_strings_need_a_tokenizer():
    with pytest.raises(UserError, match="stop strings need a tokenizer"):
        BlockDiffusionSampler().generate(random_model(), PROMPTS, stop=["a"])


def test_every_answer_is_told_once_and_early(sampler):
    told, tokens_seen = [], []
    answers = decode(
        sampler,
        on_answer=lambda index, answer: told.append((index, answer.text, len(tokens_seen))),
        on_block=lambda index, tokens: tokens_seen.append(index),
    )
    assert sorted((index, text) for index, text, _ in told) == [(i, answer.text) for i, answer in enumerate(answers)]
    assert told[0][2] < len(tokens_seen)  # the others were still going on


def test_a_sampler_that_knows_nothing_of_it_is_cut_and_told_all_the_same():
    class Stubborn(BlockDiffusionSampler):
        def decode(self, model, prompts, request):
            return super().decode(model, prompts, type(request)(request.max_new_tokens))

    told = []
    stubborn = Stubborn(ConfidenceThreshold(0.2), block_length=4, max_new_tokens=24)
    stop = decode(stubborn)[0].text[5]
    answers = decode(stubborn, stop=stop, on_answer=lambda index, answer: told.append(index))
    assert told == list(range(len(PROMPTS)))
    assert answers[0].finish_reason == "stop" and stop not in answers[0].text


# -- where a text is cut -----------------------------------------------------------------------------------------------

PIECES = ["a", "b", "ab", "ba", " a", "b ", "aab", "\n", " ", "<pad>", "<mask>", "<eos>"]


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(0, len(PIECES) - 1), max_size=12),
    st.lists(st.text("ab \n", min_size=1, max_size=4), min_size=1, max_size=3),
    st.integers(1, 5),
)
def test_growing_answers_are_found_and_cut_as_whole_texts_are(tokens, strings, step):
    tokenizer = letters(PIECES)
    stop, text = StopStrings(strings, tokenizer), tokenizer.decode(tokens)
    first = min((at for string in strings if (at := text.find(string)) >= 0), default=None)
    cut = stop.cut(tokens)
    assert (cut is None) == (first is None)
    if cut is not None:
        kept, before = cut
        assert text[:first].startswith(before) and not text[len(before) : first].strip()
        assert len(tokenizer.decode(tokens[: max(kept - 1, 0)])) <= first <= len(tokenizer.decode(tokens[: kept + 1]))
    for length in [*range(0, len(tokens), step), len(tokens)]:
        part = tokenizer.decode(tokens[:length])
        found = stop.find(7, tokens[:length]) is not None
        assert found == any(string in part for string in strings)
        if found:  # the answer ends here, whatever another stop string would have made of what never comes
            break
        assert (text if cut is None else cut[1]).startswith(stop.settled(part)), "what was shown must stay"


def test_a_token_that_holds_text_and_stop_stays_and_its_text_is_cut():
    tokenizer = letters([*PIECES, "a.\n"])
    assert StopStrings(["\n"], tokenizer).cut([0, len(PIECES), 1]) == (2, "aa.")


def test_a_blank_goes_with_the_token_it_belongs_to():
    stop = StopStrings(["a"], letters(PIECES))
    assert stop.cut([1, 4]) == (1, "b")  # "b", " a"
    assert stop.cut([5, 0]) == (1, "b ")  # "b ", "a"


def test_characters_of_several_tokens(tmp_path):
    tokenizer = Tokenizer.from_pretrained(write_byte_tokenizer(tmp_path))
    tokens = tokenizer.encode("zwölf Äpfel, € 3")
    stop = StopStrings(["€"], tokenizer)
    kept, text = stop.cut(tokens)
    assert text == "zwölf Äpfel, " == tokenizer.decode(tokens[:kept])
    assert [stop.find(0, tokens[:n]) is not None for n in range(len(tokens) + 1)].index(True) == kept + len(
        "€".encode()
    )


def test_characters_that_waver_while_their_bytes_come_in():
    """A decoder that shows each byte of an unfinished character as one replacement character."""
    words = ["<0xF0>", "<0x9F>", "<0x98>", "<0x80>", "a", "<pad>", "<mask>", "<eos>"]
    tokenizer = letters(words)
    tokenizer.backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    assert tokenizer.decode([0, 1]) == "��" and tokenizer.decode([0, 1, 2, 3]) == "😀"
    assert StopStrings(["a"], tokenizer).cut([0, 1, 2, 3, 4]) == (4, "😀")
    assert StopStrings(["😀"], tokenizer).cut([4, 0, 1, 2, 3]) == (1, "a")
