import pytest

from dllm_var.datamodules import CmudictSource, JsonlSource, PackedDataModule
from dllm_var.datamodules.made_from import check_made_from
from dllm_var.errors import UserError

TOKENIZER = CmudictSource.default_tokenizer


@pytest.fixture
def made_from(list_source):
    def make(packing):
        return PackedDataModule(list_source([{"prompt": "a", "response": "K"}]), packing=packing).made_from

    return make


def test_checkpoints_of_another_plan_are_refused(made_from):
    ours = made_from("best_fit")
    check_made_from(ours, dict(ours))
    before = {name: value for name, value in ours.items() if name != "plan_version"}  # as first written
    with pytest.raises(UserError, match=r"data\.packing puts other samples together .*--data\.check_resume=false"):
        check_made_from(before, ours)


def test_rows_that_have_not_changed_since_go_on(made_from):
    ours = made_from("concat")
    check_made_from({name: value for name, value in ours.items() if name != "plan_version"}, ours)
    check_made_from({}, ours)


def test_the_setting_that_changed_is_named(made_from):
    with pytest.raises(UserError, match=r"data\.packing was concat when .* and is best_fit now: set it back"):
        check_made_from(made_from("concat"), made_from("best_fit"))


def test_data_known_by_its_path_is_told_from_other_data(write_jsonl):
    ours = PackedDataModule(JsonlSource(write_jsonl([{"prompt": "a", "response": "K"}])), TOKENIZER).made_from
    earlier = {**ours, "source": 'JsonlSource {"train": [["/data.jsonl", "0f"]]}'}
    del earlier["source_version"]
    with pytest.raises(UserError, match=r"where its data lay.*make sure that data\.source is the same; then .*=false"):
        check_made_from(earlier, ours)
    with pytest.raises(UserError, match=r"data\.source has other records"):
        check_made_from({**ours, "source": "JsonlSource of something else"}, ours)
    unchanged = PackedDataModule().made_from
    check_made_from({name: value for name, value in unchanged.items() if name != "source_version"}, unchanged)
