import itertools

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.trainer.states import TrainerFn
from recorded_runs import ListSource, Recorder, make_trainer

from dllm_var.datamodules import CmudictSource, JsonlSource, PackedDataModule
from dllm_var.errors import UserError

WORDS = [{"prompt": "a" * (1 + n % 9), "response": " ".join(["K"] * (1 + n % 7))} for n in range(200)]
HELD_OUT = {"validation": WORDS[:43], "test": WORDS[:31]}


def make(records=WORDS, splits=None, **kwargs):
    return PackedDataModule(ListSource(records, **(splits or {})), **{"context_length": 32, "batch_size": 4, **kwargs})


def turns(*contents):
    roles = itertools.cycle(("user", "assistant"))
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]}


def test_cmudict_is_the_default():
    data = PackedDataModule(context_length=128, packing="best_fit", overhang=8, seed=3)
    report = data.report("test")
    assert report["samples"] > 2_000 and report["utilisation"] > 0.96
    assert (report["dropped"], report["skipped"], report["unknown_tokens"]) == (0, 0, 0)
    assert next(iter(data.test_dataloader()))["input_ids"].shape == (32, 128)
    examples = data.held_out("test")
    assert len(examples) == 2_000
    assert data.held_out("test", 7) == examples[:7] == PackedDataModule(CmudictSource(), seed=4).held_out("test", 7)
    assert sum(len(example.references) for example in examples) == report["samples"]
    for example in examples[:20]:
        assert data.tokenizer.encode(example.prompt) == example.prompt_ids
        assert not any(data.tokenizer.terminator_id in reference for reference in example.references)
    assert {example.prompt for example in examples} == {record["prompt"] for record in data.source.records("test")}


def test_conversations_are_held_out_up_to_their_last_answer():
    data = make(
        splits={"validation": [turns("ab", "K", "c", "IY K"), {"text": "K IY"}, {"prompt": "", "response": "K"}]}
    )
    (example,) = data.held_out("validation")  # the others have no prompt
    spell = data.tokenizer.encode
    assert example.prompt_ids == [*spell("ab"), *spell("K"), data.tokenizer.terminator_id, *spell("c")]
    assert example.references == [spell("IY K")]


def test_held_out_splits_must_exist():
    with pytest.raises(UserError, match="no split test"):
        make().held_out("test")
    assert make().val_dataloader() == make(splits={"validation": []}).val_dataloader() == []


@pytest.mark.parametrize("workers", [0, 2])
def test_epochs_run_on_without_loss_or_repetition(workers):
    data = make(num_workers=workers, overhang=3)
    loader = data.train_dataloader()
    rows = []
    for _ in range(3):
        batches = list(loader)
        loader.sampler.trained(int(batches[-1]["row"][0]))  # what the Trainer's hook does with every batch
        rows += [row for batch in batches for row in batch["row"].tolist()]
        for batch in batches[:3]:
            again = data.rows("train").__getitems__(batch["row"].tolist())
            assert all(torch.equal(batch[name], again[name]) for name in again)
    assert rows == list(range(len(rows)))
    assert len(rows) >= 3 * len(data.rows("train"))


def test_validation_rows_do_not_depend_on_the_training_seed():
    first, second = (list(make(splits=HELD_OUT, seed=seed, overhang=3).val_dataloader()) for seed in (0, 1))
    assert all(torch.equal(a[name], b[name]) for a, b in zip(first, second, strict=True) for name in a)


LONG = [
    {"input_ids": [4] * 3 + [50] * 10, "prompt_length": 3},
    {"input_ids": [4] * 5 + [50] * 40, "prompt_length": 5},
    {"input_ids": [4] * 40 + [50] * 5, "prompt_length": 40},
    turns("ab", "K K", "c" * 40, "K"),
    turns("ab", "K " * 40, "c", "K"),
]


def test_samples_longer_than_a_row_are_dropped_and_counted():
    data = make(LONG, packing="best_fit")
    report = data.report()
    assert (report["samples"], report["dropped"], report["truncated"]) == (1, 4, 0)
    assert "4 too long and dropped" in data.summary()


def test_truncated_samples_keep_their_terminator_and_an_answer():
    data = make(LONG, packing="best_fit", on_too_long="truncate", overhang=2)
    report = data.report()
    assert (report["samples"], report["dropped"], report["truncated"]) == (4, 1, 3)
    end, letters, k = data.tokenizer.terminator_id, data.tokenizer.encode("ab"), data.tokenizer.encode("K")
    batch = data.rows("train").__getitems__(range(len(data.rows("train"))))
    found = []
    for row, segment in itertools.product(range(len(batch["row"])), range(32)):
        at = (batch["segment_ids"][row] == segment) & (batch["input_ids"][row] != data.tokenizer.mask_id)
        if at.any():
            found.append((batch["input_ids"][row, at].tolist(), int(batch["supervised"][row, at].sum())))
    assert sorted(found) == sorted(
        [
            ([4] * 3 + [50] * 10 + [end], 11),
            ([4] * 5 + [50] * 26 + [end], 27),  # cut before the terminator
            ([*letters, *k, *k, end], 3),  # the second answer does not fit, the first does
            ([*letters, *(k * 29), end], 30),  # the first one does not fit either: cut
        ]
    )


@pytest.mark.parametrize("context", range(4, 24, 3))
def test_truncation_never_leaves_a_false_or_missing_end(context):
    records = [turns("abc", "K K", "de", "IY", "f", "L L"), {"input_ids": [4]}]
    data = make(records, context_length=context, packing="best_fit", on_too_long="truncate", canvas=2)
    whole, ends = data.table("train").ids(0), data.tokenizer.terminator_ids
    flags = data.table("train").supervised[: len(whole)].tolist()
    samples = data.rows("train").samples(0)
    if 0 not in samples.index:
        assert context <= 4, "nothing but the prompt fits"
        return
    body, start = int(samples.body[0]), int(samples.answer_start[0])
    added = int(samples.content[0]) - body
    assert body + added <= context
    assert all(flags[start:body]) and not flags[start - 1]
    assert added == (whole[body - 1] not in ends), "one end, the sample's own or an added one"
    data.rows("train").__getitems__(range(len(data.rows("train"))))


def test_long_samples_may_be_cut_over_rows():
    data = make(LONG, on_too_long="cut")
    report = data.report()
    assert (report["samples"], report["dropped"]) == (5, 0)
    assert report["tokens"] == data.table("train").offsets[-1]


def test_skipped_records_are_counted_and_shown():
    with pytest.raises(UserError, match="ListSource train record 1 lacks"):
        make([WORDS[0], {"prompt": "a"}]).rows("train")
    data = make([WORDS[0], {"prompt": "a"}], on_bad_record="skip")
    assert data.report()["skipped"] == 1
    assert "1 bad records skipped, the first: ListSource train record 1 lacks the field 'response'" in data.summary()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "data.batch_size is 0"),
        ({"context_length": 1}, "data.context_length is 1"),
        ({"canvas": None}, "data.canvas is None; it must be at least 0"),
        ({"overhang": 32}, "below data.context_length, 32"),
        ({"overhang": 3, "canvas": 4}, "exclude each other"),
        ({"packing": "best_fit", "on_too_long": "cut"}, "data.packing=concat"),
        ({"tokenizer": "./nowhere"}, "nowhere does not exist"),
        ({"chat": True}, "no chat template"),
        ({"records": []}, "no records that can be used"),
        ({"records": LONG[1:3]}, r"all 2 samples .* raise it \(the shortest has 46 tokens\)"),
    ],
)
def test_mistakes_are_told_in_one_line(settings, message):
    with pytest.raises(UserError, match=message) as error:
        make(**settings).rows("train")
    assert "\n" not in str(error.value)


def test_settings_come_from_a_config(write_jsonl):
    parser = ArgumentParser()
    parser.add_class_arguments(PackedDataModule, "data")
    arguments = {"path": write_jsonl(WORDS), "validation_size": 3}
    source = {"class_path": "dllm_var.datamodules.JsonlSource", "init_args": arguments}
    settings = {"source": source, "tokenizer": CmudictSource.default_tokenizer, "context_length": 64}
    data = parser.instantiate(parser.parse_object({"data": settings})).data
    assert isinstance(data.source, JsonlSource) and data.source.validation_size == 3
    assert data.rows("train").context_length == 64
    with pytest.raises(UserError, match=r"data\.tokenizer is not set, and JsonlSource has none"):
        PackedDataModule(data.source)


def run(folder, data, **arguments):
    model, trainer = Recorder(), make_trainer(folder, max_epochs=3, num_sanity_val_steps=0, **arguments)
    trainer.fit(model, datamodule=data)
    trainer.test(model, datamodule=data)
    return model.seen


def check(seen, data, ranks):
    train = [row for rows in seen["train"] for row in rows]
    assert train == list(range(len(train)))
    assert len(seen["train"]) == 3 * -(-len(data.rows("train")) // (data.batch_size * ranks))
    for split, times in (("validation", 3), ("test", 1)):
        rows = [row for step in seen[split] for row in step if row >= 0]
        assert sorted(rows) == sorted(list(range(len(data.rows(split)))) * times)


def test_a_trainer_sees_each_row_once(tmp_path):
    data = make(splits=HELD_OUT, overhang=3, packing="best_fit")
    check(run(tmp_path, data, devices=1), data, 1)


# -- going on from a checkpoint ----------------------------------------------------------------------------------------


class Fitting:
    """A Trainer as the data module sees it in `fit`."""

    class state:
        fn = TrainerFn.FITTING


def resume(before, after, change=lambda identity: None, **settings):
    """Loads a checkpoint of some settings, its identity changed, into a run of others."""
    ours, theirs = make(**after, **settings), make(**before, **settings)
    state = {**theirs.state_dict(), "next_row": 7}
    change(state["identity"])
    ours.trainer = Fitting()
    ours.load_state_dict(state)
    assert ours.state_dict()["next_row"] == 7


def test_a_run_goes_on_only_with_the_same_rows():
    concat, best_fit = {"packing": "concat"}, {"packing": "best_fit"}
    resume(concat, concat)
    resume(concat, best_fit, check_resume=False)
    with pytest.raises(UserError, match=r"data\.packing has another value \(best_fit instead of concat\)"):
        resume(concat, best_fit)
    with pytest.raises(UserError, match=r"data\.source has other records"):
        resume({}, {"records": WORDS[:3]})
    with pytest.raises(UserError, match=r"data\.packing puts other samples together .*--data\.check_resume=false"):
        resume(best_fit, best_fit, lambda identity: identity.update(plan_version=2))
