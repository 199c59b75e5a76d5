"""`evaluate` as a user meets it, with the harness itself; tasks from local files."""

import json
import re
from itertools import islice
from pathlib import Path

import pytest

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

from dllm_var.__main__ import main
from dllm_var.checkpoints.export import save_checkpoint_folder
from dllm_var.checkpoints.pretrained import load_checkpoint
from dllm_var.datamodules import CmudictSource
from dllm_var.errors import UserError
from dllm_var.evaluation.likelihood import Likelihood
from dllm_var.evaluation.lm import EvaluatedModel
from dllm_var.evaluation.scoring import documents, error_rate, final_number_scores, pronunciation_scores
from dllm_var.metrics import AnswerMetrics
from dllm_var.sampling import BlockDiffusionSampler
from dllm_var.sampling.base import sampler_from_config
from dllm_var.text.tokenizer import Tokenizer
from tests.byte_tokenizer import CHAT_TEMPLATE, write_byte_tokenizer
from tests.published import SDAR_CONFIG, write_block_causal
from tests.sampling.tiny_models import TOKENIZER, random_model

ROOT = Path(__file__).parent.parent.parent
CHECKPOINT = str(ROOT / "checkpoints" / "cmudict")
TWIN = str(ROOT / "checkpoints" / "cmudict_autoregressive")
CHOICES = """
task: which
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{word}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{right}}}}"
target_delimiter: " "
metric_list: [{{metric: acc}}]
"""
WORDS = {
    "cat": "K AE T",
    "keyboard": "K IY B AO R D",
    "lightning": "L AY T N IH NG",
    "diffusion": "D IH F Y UW ZH AH N",
}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def grouped(records, count):
    """The first records, those with the same prompt together."""
    by_prompt = {}
    for record in records:
        by_prompt.setdefault(record["prompt"], []).append(record["response"])
    return [{"prompt": prompt, "responses": answers} for prompt, answers in islice(by_prompt.items(), count)]


def complaint(capsys, *arguments):
    assert main(list(arguments)) == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    return line


def request(text, task="task", **settings):
    return Instance("generate_until", {}, (text, settings), 0, metadata=(task, 0, 1))


def test_the_shipped_task_gives_the_error_rates_of_run_summary(capsys):
    arguments = ["--checkpoint", CHECKPOINT, "--tasks", "cmudict", "--limit", "48", "--output", "result.json"]
    assert main(["evaluate", *arguments, "--samples"]) == 0
    result = json.loads(Path("result.json").read_text())
    model, tokenizer, meta = load_checkpoint(CHECKPOINT)
    lines = grouped(CmudictSource().records("test"), 48)
    answers = sampler_from_config(meta["sampler"]).generate(
        model, [line["prompt"] for line in lines], tokenizer=tokenizer
    )
    metrics = AnswerMetrics()
    metrics.update(answers, [[tokenizer.encode(text) for text in line["responses"]] for line in lines])
    expected = metrics.compute()
    scores = result["results"]["cmudict"]
    assert 0 < expected["token_error_rate"] < 0.2
    assert scores["per,none"] == pytest.approx(expected["token_error_rate"])
    assert scores["wer,none"] == pytest.approx(expected["answer_error_rate"])
    assert scores["length_exact,none"] == pytest.approx(expected["length_exact"])
    ours = result["dllm_var"]["decoding"]["cmudict"]
    assert ours["answers"] == 48 and ours["tokens"] == expected["tokens"]
    assert ours["tokens_per_forward"] == pytest.approx(expected["tokens_per_forward"])
    assert ours["ended_by_eos"] == pytest.approx(expected["ended_by_eos"])
    assert ours["useful_tokens_per_second"] == pytest.approx(ours["tokens"] / ours["seconds"])
    assert [sample["resps"] for sample in result["samples"]["cmudict"]] == [[[answer.text]] for answer in answers]
    assert result["dllm_var"]["sampler"]["init_args"]["block_length"] == 12
    assert "dllm-var" in result["dllm_var"]["versions"] and "git" in result["dllm_var"]
    shown = capsys.readouterr().out
    assert re.search(r"cmudict: 48 answers, 100.0% ended by eos", shown) and "|per" in shown.replace(" ", "")


def test_options_reach_the_sampler():
    arguments = ["--tasks", "cmudict", "--limit", "3", "--output", "result.json", "--max-new-tokens", "2"]
    assert (
        main(["evaluate", "--checkpoint", CHECKPOINT, *arguments, "--policy", "FixedSteps", "--policy.steps=12"]) == 0
    )
    ours = json.loads(Path("result.json").read_text())["dllm_var"]
    assert ours["sampler"]["init_args"]["policy"]["init_args"]["steps"] == 12
    assert ours["decoding"]["cmudict"]["hit_limit"] == 1 and ours["decoding"]["cmudict"]["tokens"] == 6


@pytest.mark.parametrize("checkpoint", [CHECKPOINT, TWIN])
def test_likelihoods_choose_the_right_pronunciation(checkpoint, capsys):
    answers = list(WORDS.values())
    lines = [{"word": word, "choices": answers, "right": answers.index(answer)} for word, answer in WORDS.items()]
    Path("which.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    Path("which.yaml").write_text(CHOICES.format(file=Path("which.jsonl").absolute()))
    options = ["--mc-draws", "16", "--mc-canvas", "12", "--output", "result.json"]
    assert main(["evaluate", "--checkpoint", checkpoint, "--tasks", "which.yaml", *options]) == 0
    result = json.loads(Path("result.json").read_text())
    assert result["results"]["which"]["acc,none"] == 1
    assert result["dllm_var"]["likelihood"]["estimator"] == ("exact" if checkpoint == TWIN else "Monte-Carlo bound")


def test_a_published_block_causal_model_is_evaluated_as_its_release_decodes(folder):
    """A tiny SDAR: generated answers are those of the sampler that its family has, choices those of its likelihoods."""
    config = {**SDAR_CONFIG, "vocab_size": 270, "mask_token_id": 257, "eos_token_id": 260}
    write_block_causal(folder / "sdar", config)
    write_byte_tokenizer(folder / "sdar", CHAT_TEMPLATE)
    lines = [{"word": word, "choices": list(WORDS.values()), "right": n} for n, word in enumerate(WORDS)]
    Path("which.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    Path("which.yaml").write_text(CHOICES.format(file=Path("which.jsonl").absolute()))
    options = ["--limit=4", "--max-new-tokens=9", "--mc-draws=4", "--output=result.json", "--samples"]
    assert main(["evaluate", "--checkpoint", "sdar", "--tasks", "cmudict", "which.yaml", *options]) == 0
    result = json.loads(Path("result.json").read_text())
    model, tokenizer, meta = load_checkpoint("sdar")
    assert result["dllm_var"]["sampler"]["init_args"]["block_length"] == 4
    prompts = [sample["arguments"][0][0] for sample in result["samples"]["cmudict"]]
    answers = sampler_from_config(meta["sampler"]).generate(model, prompts, tokenizer=tokenizer, max_new_tokens=9)
    assert [sample["resps"][0][0] for sample in result["samples"]["cmudict"]] == [answer.text for answer in answers]
    pairs = [(tokenizer.encode(word), tokenizer.encode(f" {answer}")) for word in WORDS for answer in WORDS.values()]
    scores = [score.log_likelihood for score in Likelihood(draws=4)(model, pairs)]
    best = [max(range(4), key=lambda choice: scores[4 * n + choice]) for n in range(4)]
    assert result["results"]["which"]["acc,none"] == sum(choice == n for n, choice in enumerate(best)) / 4


def test_generate_until_is_the_samplers_generate():
    model = random_model()
    sampler = BlockDiffusionSampler(block_length=4, max_new_tokens=9, batch_size=2)
    evaluated = EvaluatedModel(model, TOKENIZER, sampler)
    texts = ["w5 w6", "w7", "w8 w9 w10", ""]
    expected = sampler.generate(model, [*texts[:3], TOKENIZER.id_to_token(3)], tokenizer=TOKENIZER, max_new_tokens=7)
    got = evaluated.generate_until([request(text, until=[], max_gen_toks=7) for text in texts])
    assert got == [answer.text for answer in expected]
    # Each group of requests has its own stop strings and limit; the answers come back in order.
    stop = next(answer.text.split()[1] for answer in expected if len(answer.tokens) > 2)
    tasks = ["one", "other", "one", "other"]
    requests = [request(texts[n], tasks[n], until=stop, max_gen_toks=5 + n) for n in range(4)]
    for n, text in enumerate(evaluated.generate_until(requests)):
        [alone] = sampler.generate(
            model, [texts[n] or TOKENIZER.id_to_token(3)], tokenizer=TOKENIZER, max_new_tokens=5 + n, stop=[stop]
        )
        assert text == alone.text
    assert len(evaluated.decoded["one"].answers) == len(evaluated.decoded["other"].answers) == 2


def test_rolling_likelihood_is_the_sum_over_windows():
    model = random_model(causal=True, context_length=6)
    evaluated = EvaluatedModel(model, TOKENIZER)
    ids = [5, 6, 7, 8, 9, 10, 11, 12]
    text = " ".join(f"w{token}" for token in ids)
    instance = Instance("loglikelihood_rolling", {}, (text,), 0, metadata=("task", 0, 1))
    # lm-eval's windows: the first starts with the terminator, later ones have as much context as fits.
    pairs = [([3], ids[:6]), (ids[1:6], ids[6:])]
    expected = sum(score.log_likelihood for score in Likelihood()(model, pairs))
    assert evaluated.loglikelihood_rolling([instance])[0] == pytest.approx(expected, rel=1e-5)


def test_it_is_registered_and_loads_a_checkpoint():
    kind = get_model("dllm_var")
    assert kind is EvaluatedModel
    evaluated = kind.create_from_arg_string(f"checkpoint={CHECKPOINT},draws=4", {"batch_size": 8, "device": "cpu"})
    assert evaluated.likelihood == Likelihood(draws=4, batch_size=8)
    assert evaluated.sampler.block_length == 12
    assert evaluated.generate_until([request("keyboard")]) == ["K AY B AO R D"]


def test_chat_prompts_go_through_the_template(folder):
    tokenizer = Tokenizer.from_pretrained(write_byte_tokenizer(folder, CHAT_TEMPLATE))
    evaluated = EvaluatedModel(random_model(vocab_size=tokenizer.vocab_size), tokenizer)
    turns = [{"role": "user", "content": "Hi"}]
    assert evaluated.apply_chat_template(turns) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    started = [*turns, {"role": "assistant", "content": "Well,"}]
    text = evaluated.apply_chat_template(started, add_generation_prompt=False)
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nWell,"
    with pytest.raises(UserError, match="chat template"):
        EvaluatedModel(random_model(), TOKENIZER).apply_chat_template(turns)


def test_a_checkpoint_that_was_trained_on_conversations_is_evaluated_on_conversations(folder):
    tokenizer = Tokenizer.from_pretrained(write_byte_tokenizer(folder / "tokenizer", CHAT_TEMPLATE))
    ids = dict(mask_id=tokenizer.mask_id, terminator_ids=list(tokenizer.terminator_ids), pad_id=tokenizer.pad_id)
    model = random_model(vocab_size=tokenizer.vocab_size, **ids)
    chats = save_checkpoint_folder(folder / "chats", model, tokenizer, {"chat": True})
    texts = save_checkpoint_folder(folder / "texts", model, tokenizer)
    asked = {}
    for checkpoint, option in ((chats, None), (chats, "--no-chat"), (texts, "--chat")):
        options = ["--tasks", "cmudict", "--limit=1", "--max-new-tokens=2", "--output=result.json", "--samples"]
        assert main(["evaluate", "--checkpoint", str(checkpoint), *options, *([option] if option else [])]) == 0
        result = json.loads(Path("result.json").read_text())
        [sample] = result["samples"]["cmudict"]
        asked[checkpoint.name, option] = sample["arguments"][0][0]  # the prompt
        assert result["dllm_var"]["chat"] is asked[checkpoint.name, option].startswith("<|im_start|>user")
    assert asked["chats", None] == asked["texts", "--chat"] != asked["chats", "--no-chat"]


def test_shipped_documents_are_the_sources_test_split():
    shipped = documents("cmudict.jsonl")["test"].to_list()
    assert len(shipped) == 2000
    assert shipped == grouped(CmudictSource().records("test"), 2000)


@pytest.mark.reasoning_gym
def test_shipped_problems_are_the_sources_test_split():
    from dllm_var.datamodules import GsmSymbolicSource

    shipped = documents("gsm_symbolic.jsonl")["test"].to_list()
    assert shipped == grouped(GsmSymbolicSource().records("test"), 500)


def test_scores_of_answers():
    words = {"responses": ["K AE T", "K AE T S"]}
    assert pronunciation_scores(words, ["K AE T S"]) == {"per": (0, 4), "wer": 0.0, "length_exact": 1.0}
    assert pronunciation_scores(words, ["K AH"]) == {"per": (2, 3), "wer": 1.0, "length_exact": 0.0}
    assert error_rate([(1, 4), (2, 2)]) == 0.5
    problem = {"responses": ["2 and 3 are 5.\n#### 1,005"]}
    assert final_number_scores(problem, ["So\n#### 1005"]) == {"accuracy": 1.0, "same_text": 0.0}
    assert final_number_scores(problem, ["1005"]) == {"accuracy": 0.0, "same_text": 0.0}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--checkpoint", CHECKPOINT], "--tasks"),
        (["--tasks", "cmudict"], "--checkpoint"),
        (["--checkpoint", CHECKPOINT, "--tasks", "none.yaml"], "no file 'none.yaml'"),
        (["--checkpoint", CHECKPOINT, "--tasks", "cmudict", "--include-path", "none"], "no folder 'none'"),
        (["--checkpoint", CHECKPOINT, "--tasks", "cmudict", "--samples"], "--output"),
        (["--checkpoint", CHECKPOINT, "--tasks", "cmudict", "--limit", "0"], "--limit"),
        (
            ["--checkpoint", CHECKPOINT, "--tasks", "cmudict", "--output", "no/where.json"],
            "cannot use 'no/where.json': No such file",
        ),
        (["--checkpoint", CHECKPOINT, "--tasks", "cmudict", "--chat"], "chat template"),
    ],
)
def test_mistakes_are_named_in_one_line(capsys, arguments, says):
    assert says in complaint(capsys, "evaluate", *arguments)


@pytest.mark.slow
def test_an_unknown_task_gets_a_suggestion(capsys):
    """Slow: lm-eval looks through the thousands of tasks it has."""
    said = complaint(capsys, "evaluate", "--checkpoint", CHECKPOINT, "--tasks", "gsm8kk")
    assert "no task 'gsm8kk'; did you mean 'gsm8k" in said
