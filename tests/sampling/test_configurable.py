"""The description of a sampler in a checkpoint: our own classes with plain arguments, and nothing else."""

import sys

import pytest

from dllm_var.errors import UserError
from dllm_var.sampling import BlockDiffusionSampler, FixedLengthSampler, FixedSteps, FreeDaveSampler, WinoSampler
from dllm_var.sampling.base import sampler_from_config
from dllm_var.sampling.configurable import sampler_to_config
from dllm_var.sampling.policies import SchED

SAMPLER = "dllm_var.sampling.BlockDiffusionSampler"


def described(**arguments):
    return {"class_path": SAMPLER, "init_args": arguments}


def policy(name="SchED", **arguments):
    return {"class_path": f"dllm_var.sampling.policies.{name}", "init_args": arguments}


def test_what_is_left_out_has_its_default():
    expected = sampler_to_config(BlockDiffusionSampler(block_length=7))
    assert sampler_to_config(sampler_from_config(described(block_length=7))) == expected
    assert sampler_from_config({"class_path": SAMPLER}).block_length == BlockDiffusionSampler().block_length


def test_a_class_is_known_by_the_longer_path_of_earlier_versions():
    earlier = {"class_path": "dllm_var.sampling.block_diffusion.BlockDiffusionSampler", "init_args": {}}
    assert type(sampler_from_config(earlier)) is BlockDiffusionSampler


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("text", "not described by class_path"),
        ([], "not described by class_path"),
        ({"init_args": {}}, "not described by class_path"),
        ({"class_path": SAMPLER, "init_args": "text"}, "not described by class_path"),
        ({"class_path": SAMPLER, "init_args": {}, "dict_kwargs": {"policy": policy()}}, "not described by class_path"),
        ({"class_path": "os.system", "init_args": {"command": "true"}}, "os.system, not a part"),
        ({"class_path": "dllm_var.sampling.BlockRun"}, "not a part"),
        ({"class_path": "dllm_var.sampling.Sampler"}, "not a part"),
        ({"class_path": "dllm_var.sampling.engine.EngineSampler"}, "not a part"),
        ({"class_path": "dllm_var.sampling.infilling._GapFiller"}, "not a part"),
        ({"class_path": "dllm_var.sampling_of_mine.BlockDiffusionSampler"}, "not a part"),
        (policy(), "is no Sampler"),
        (described(colour=3), "cannot have colour=3"),
        (described(policy={"class_path": "my.Policy"}), "my.Policy, not a part"),
        (described(policy="planted.Policy"), "cannot have policy='planted.Policy'"),
        (described(policy="planted.yaml"), "cannot have policy='planted.yaml'"),
        (described(policy=policy(base="planted.Policy")), "SchED cannot have base='planted.Policy'"),
        (described(policy=[policy()]), "cannot have policy"),
        (described(policy={"class_path": SAMPLER}), "is no UnmaskingPolicy"),
        (described(block_length_policy=policy()), "is no BlockLengthPolicy"),
        (described(block_length="planted.yaml"), "cannot have block_length"),
        (described(block_length=True), "cannot have block_length=True"),
        (described(block_length=8.0), "cannot have block_length=8.0"),
        (described(temperature=float("nan")), "cannot have temperature=nan"),
        (described(grid="this.P"), "cannot have grid='this.P'"),
        (described(block_length=0), "block_length must be at least 1"),
        ({"class_path": "dllm_var.sampling.GuidedSampler"}, "cannot build .*guide"),
    ],
)
def test_anything_else_is_refused_and_nothing_imported(config, message, tmp_path, monkeypatch):
    (tmp_path / "planted.py").write_text("raise AssertionError('imported')")
    (tmp_path / "planted.yaml").write_text("class_path: planted.Policy")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        sampler_from_config(config)
    assert "planted" not in sys.modules


@pytest.mark.parametrize(
    ("kind", "setting", "allowed"),
    [
        (BlockDiffusionSampler, {"grid": "page"}, "sampler.grid must be prompt or absolute, got page"),
        (FixedLengthSampler, {"cache": "double"}, "sampler.cache must be none or prefix or dual or dkv or free"),
        (FreeDaveSampler, {"kv_commit": "last_step"}, "sampler.kv_commit must be joint_next or alone"),
        (WinoSampler, {"kv_commit": "last_step"}, "sampler.kv_commit must be joint_next or alone"),
        (FixedSteps, {"score": "luck"}, "FixedSteps.score must be confidence or margin or entropy or random"),
        (SchED, {"shape": "round"}, "SchED.shape must be cosine or linear or exponential"),
    ],
)
def test_a_word_that_a_setting_does_not_know_is_refused(kind, setting, allowed):
    with pytest.raises(UserError, match=allowed):
        kind(**setting)
