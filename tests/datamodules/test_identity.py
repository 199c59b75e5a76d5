import pytest
from lightning.pytorch.trainer.states import TrainerFn

from dllm_var.datamodules import CmudictSource, JsonlSource, PackedDataModule
from dllm_var.errors import UserError


class Fitting:
    """A Trainer as the data module sees it in `fit`."""

    class state:
        fn = TrainerFn.FITTING


@pytest.fixture
def resume(list_source):
    """Loads a checkpoint of some settings, its identity changed, into a run of others."""

    def resume(before, after, change=lambda identity: None, **settings):
        ours, theirs = (
            PackedDataModule(list_source([{"prompt": "a", "response": "K"}]), packing=packing, **settings)
            for packing in (after, before)
        )
        state = {**theirs.state_dict(), "next_row": 7}
        change(state["identity"])
        ours.trainer = Fitting()
        ours.load_state_dict(state)
        assert ours.state_dict()["next_row"] == 7

    return resume


def test_the_setting_that_changed_is_named(resume):
    resume("concat", "concat")
    with pytest.raises(UserError, match=r"data\.packing was concat when .* and is best_fit now: set it back"):
        resume("concat", "best_fit")
    resume("concat", "best_fit", check_resume=False)


def test_rows_of_another_version_are_refused_and_unchanged_ones_go_on(resume):
    with pytest.raises(UserError, match=r"data\.packing puts other samples together .*--data\.check_resume=false"):
        resume("best_fit", "best_fit", lambda identity: identity.update(plan_version=2))
    resume("concat", "concat", lambda identity: identity.pop("plan_version"))


def test_checkpoints_from_before_the_identity_had_its_name_are_compared_too(list_source):
    data = PackedDataModule(list_source([{"prompt": "a", "response": "K"}]))
    data.trainer = Fitting()
    data.load_state_dict({"next_row": 3, "made_from": data.identity})
    with pytest.raises(UserError, match=r"data\.seed was 5"):
        data.load_state_dict({"next_row": 3, "made_from": {**data.identity, "seed": 5}})


def test_other_records_are_refused(write_jsonl):
    record = {"prompt": "a", "response": "K"}
    data = PackedDataModule(JsonlSource(write_jsonl([record])), CmudictSource.default_tokenizer)
    other = PackedDataModule(JsonlSource(write_jsonl([record] * 2, "b.jsonl")), CmudictSource.default_tokenizer)
    data.trainer = Fitting()
    with pytest.raises(UserError, match=r"data\.source has other records"):
        data.load_state_dict(other.state_dict())
