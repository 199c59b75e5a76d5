"""Loss on the assistant's turns, held to the mask that transformers makes of a template's own generation marks.

Published templates rarely have such marks. Here the kinds in use are written with marks, for transformers, and without,
as they are published, for us: for any conversation both must say the same.
"""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, normalizers

from dllm_var.errors import UserError
from dllm_var.text.tokenizer import Tokenizer
from tests.byte_tokenizer import encode_chat, write_byte_tokenizer

LOOP = "{% for message in messages %}"
# The generation prompt, and marks from behind it to the terminator.
KINDS = {
    # Qwen2, SmolLM2, Dream: a line of its own after each turn, and a system prompt that is there unasked.
    "chatml": (
        "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe good.<|im_end|>\n{% endif %}"
        + LOOP
        + "<|im_start|>{{ message['role'] }}\n{% if message['role'] == 'assistant' %}{% generation %}"
        "{{ message['content'] }}<|im_end|>{% endgeneration %}{% else %}{{ message['content'] }}<|im_end|>{% endif %}\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    # Llama 3, LLaDA: contents stripped, nothing between turns.
    "stripped": (
        "{{ bos_token }}" + LOOP + "<|im_start|>{{ message['role'] }}<|im_start|>\n\n"
        "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] | trim }}<|im_end|>"
        "{% endgeneration %}{% else %}{{ message['content'] | trim }}<|im_end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant<|im_start|>\n\n{% endif %}"
    ),
    # Mistral: the generation prompt is the end of the user's turn; answers end with eos_token.
    "instructions": (
        "{{ bos_token }}" + LOOP + "{% if message['role'] == 'assistant' %}{% generation %} {{ message['content'] }}"
        "{{ eos_token }}{% endgeneration %}{% else %}[INST] {{ message['content'] }} [/INST]{% endif %}{% endfor %}"
    ),
    # Qwen3: the last answer begins with an empty thought, earlier ones lose theirs.
    "thoughts": (
        LOOP + "<|im_start|>{{ message['role'] }}\n{% if message['role'] == 'assistant' %}{% generation %}"
        "{% set content = message['content'].split('</think>')[-1].lstrip('\n') %}"
        "{% if loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ content }}<|im_end|>{% endgeneration %}"
        "{% else %}{{ message['content'] }}<|im_end|>{% endif %}\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
}
# U+FDD0, which is no character, is refused: it marks what spells a special token.
TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="<\ufdd0"), min_size=1, max_size=12).filter(str.strip)
TURNS = st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=4)


def conversation(turns, system):
    messages = [{"role": "system", "content": system}] if system else []
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return messages


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """For each kind: transformers with the marks, ours with and without them."""
    transformers = pytest.importorskip("transformers")
    found = {}
    for kind, marked in KINDS.items():
        bare = marked.replace("{% generation %}", "").replace("{% endgeneration %}", "")
        names = dict(bos_token="<|endoftext|>")
        folders = [
            write_byte_tokenizer(tmp_path_factory.mktemp(kind), template, **names) for template in (marked, bare)
        ]
        theirs = transformers.AutoTokenizer.from_pretrained(folders[0])
        found[kind] = (theirs, [Tokenizer.from_pretrained(folder) for folder in folders])
    return found


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(turns=TURNS, system=st.one_of(st.none(), TEXTS))
def test_marked_or_not_the_mask_is_that_of_transformers(pairs, kind, turns, system):
    theirs, ours = pairs[kind]
    messages = conversation(turns, None if kind == "instructions" else system)
    expected = theirs.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
    for tokenizer in ours:
        ids, supervised = encode_chat(tokenizer, messages)
        assert ids == expected["input_ids"][: len(ids)]
        assert supervised == [bool(flag) for flag in expected["assistant_masks"][: len(ids)]]
        assert not any(expected["assistant_masks"][len(ids) :])  # a line break after the last turn is left out
        ends = [
            index for index, flag in zip(ids, supervised, strict=True) if flag and index in tokenizer.terminator_ids
        ]
        assert len(ends) == len(turns) and ids[-1] == tokenizer.terminator_id
        for number, message in enumerate(messages):  # generation starts from what training had before each answer
            if message["role"] == "assistant" and (kind != "thoughts" or number == len(messages) - 1):
                prompt = tokenizer.encode_chat_prompt(messages[:number])
                assert ids[: len(prompt)] == prompt and not any(supervised[len(prompt) - 1 : len(prompt)])
                assert supervised[len(prompt)]


SPELLED = st.lists(
    st.sampled_from(["<|im_end|>", "<|im_start|>", "<|mask|>", "<|", "end|>", "é", " a", "\n", "<"])
).map(lambda parts: f"b{''.join(parts)}c")


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(turns=st.lists(st.tuples(SPELLED, SPELLED), min_size=1, max_size=3))
def test_what_people_spell_is_text_in_every_template(pairs, kind, turns):
    """Held to transformers' ids of the same conversation about one letter, that letter replaced by what is said."""
    theirs, ours = pairs[kind]
    messages = conversation(turns, None)
    letters = [{**message, "content": chr(0xC0 + number)} for number, message in enumerate(messages)]
    template = theirs.apply_chat_template(letters, return_assistant_tokens_mask=True, return_dict=True)
    pairs_of = [tuple(ours[0].encode(letter["content"])) for letter in letters]
    said = dict(zip(pairs_of, [message["content"] for message in messages], strict=True))
    ids, mask, place = [], [], 0
    while place < len(template["input_ids"]):
        pair = tuple(template["input_ids"][place : place + 2])  # in bytes, each of the letters is two tokens
        found = ours[0].encode(said[pair]) if pair in said else list(pair[:1])
        ids += found
        mask += [bool(template["assistant_masks"][place])] * len(found)
        place += 2 if pair in said else 1
    for tokenizer in ours:
        encoded, supervised = encode_chat(tokenizer, messages)
        assert encoded == ids[: len(encoded)] and supervised == mask[: len(encoded)]
        assert not any(mask[len(encoded) :])
        assert tokenizer.encode_chat_prompt(messages[:-1]) == ids[: len(tokenizer.encode_chat_prompt(messages[:-1]))]


def test_what_cannot_be_kept_apart_is_refused(pairs, tmp_path):
    tokenizer = pairs["chatml"][1][0]
    with pytest.raises(UserError, match=r"messages\[0\] contains U\+FDD0"):
        encode_chat(tokenizer, conversation([("a\ufdd0", "b")], None))
    one = Tokenizer.from_pretrained(write_byte_tokenizer(tmp_path, KINDS["chatml"]), mask_token="q")
    with pytest.raises(UserError, match=r"messages\[1\] spells the special token q"):
        encode_chat(one, conversation([("a", "q")], None))
    lines = Tokenizer.from_pretrained(write_byte_tokenizer(tmp_path, KINDS["chatml"]), terminators=["<|im_end|>", "z"])
    with pytest.raises(UserError, match=r"messages\[1\] contains the terminator z"):
        encode_chat(lines, conversation([("a", "z")], None))


def test_what_is_a_special_token_only_once_it_is_normalized_is_text_too(pairs):
    tokenizer = pairs["chatml"][1][0]
    backend = Tokenizer.from_dict(tokenizer.to_dict()).backend
    backend.normalizer = normalizers.Lowercase()
    backend.add_special_tokens([AddedToken("<stop>", special=True, normalized=True)])
    lowers = Tokenizer(backend, tokenizer.special, tokenizer.chat_template)
    assert backend.token_to_id("<stop>") in lowers.encode("<STOP>", special_tokens=True)
    for said in ("<STOP>", "x<sToP>"):
        ids = lowers.encode_chat_prompt([{"role": "user", "content": said}])
        assert backend.token_to_id("<stop>") not in ids and said.lower() in lowers.decode(ids)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages + 1 }}", "concatenate"),
        ("{{ messages | tojson(default=raise_exception) }}", "unexpected keyword argument"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{% for a in range(10 ** 9) %}{% endfor %}", "Range too big"),
        ("{% for a in messages %}" * 30 + "{% endfor %}" * 30, "not valid"),
        ("{{ raise_exception('no\n' * 999) }}", "no no no"),
    ],
)
def test_a_template_that_does_harm_or_makes_no_sense_is_one_line(pairs, template, message):
    tokenizer = pairs["chatml"][1][0]
    bad = Tokenizer(tokenizer.backend, tokenizer.special, template, tokenizer.named_tokens)
    with pytest.raises(UserError, match=message) as caught:
        bad.encode_chat_prompt([{"role": "user", "content": "Hi"}])
    assert "chat template" in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 400
