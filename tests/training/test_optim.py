"""Schedules, parameter groups and Muon."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from dllm_var.errors import UserError
from dllm_var.model import Transformer, TransformerConfig
from dllm_var.training.optim import AdamW, Muon, Schedule, orthogonalise, parameter_groups


def tiny(**changes) -> Transformer:
    torch.manual_seed(0)
    return Transformer(
        TransformerConfig(**{**dict(hidden_size=16, num_layers=2, num_heads=2, vocab_size=11), **changes})
    )


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant", "wsd"])
def test_schedule_warms_up_then_ends_at_its_final_share(kind):
    schedule = Schedule(kind, warmup_steps=10, final=0.1)
    shares = [schedule.share(step, 100) for step in range(101)]
    assert shares[:10] == sorted(shares[:10]) and 0 < shares[0] < 0.2
    assert shares[10] == pytest.approx(1.0)
    assert shares[10:] == sorted(shares[10:], reverse=True)
    assert shares[100] == pytest.approx(1.0 if kind == "constant" else 0.1)


def test_wsd_decays_over_its_share_of_all_steps_and_never_in_the_warmup():
    schedule = Schedule("wsd", warmup_steps=50, final=0.0, decay_share=0.2)
    assert [schedule.share(step, 200) for step in (50, 160, 170, 180, 200, 300)] == [1.0, 1.0, 0.75, 0.5, 0.0, 0.0]
    all_decay = Schedule("wsd", warmup_steps=50, final=0.0, decay_share=1.0)
    assert [all_decay.share(step, 200) for step in (50, 125, 200)] == [1.0, 0.5, 0.0]
    assert Schedule("wsd", warmup_steps=0).share(0, 0) == 0.0  # resumed after its last step


def test_impossible_schedules_are_named():
    with pytest.raises(UserError, match="warmup_steps"):
        Schedule(warmup_steps=-1)


@pytest.mark.parametrize("tied", [False, True])
def test_every_parameter_is_in_one_group_and_only_matrices_decay(tied):
    model = tiny(tie_embeddings=tied, qkv_bias=True)
    groups = {group["role"]: group for group in parameter_groups(model)}
    ids = [id(p) for group in groups.values() for p in group["params"]]
    assert sorted(ids) == sorted({id(p) for p in model.parameters()})
    assert all(p.dim() == 2 for p in groups["hidden"]["params"])
    assert groups["rest"]["weight_decay"] == 0.0
    assert ("head" in groups) != tied
    assert any(p is model.embedding.weight for p in groups["rest"]["params"])


def test_orthogonalise_brings_singular_values_near_one():
    torch.manual_seed(0)
    for shape in [(3, 16, 16), (2, 8, 40), (2, 40, 8)]:
        values = torch.linalg.svdvals(orthogonalise(torch.randn(shape)))
        assert values.min() > 0.3 and values.max() < 1.4


@pytest.mark.parametrize("rank", [8, 2])
@pytest.mark.parametrize("shape", [(3, 8, 40), (3, 40, 8), (3, 8, 8)])
def test_orthogonalise_equals_the_iteration_on_the_whole_matrix(shape, rank):
    torch.manual_seed(0)
    matrices = torch.randn(shape[0], shape[1], rank) @ torch.randn(shape[0], rank, shape[2])
    x = matrices.double() / matrices.double().norm(dim=(1, 2), keepdim=True)
    for _ in range(5):
        cube = x @ x.mT @ x
        x = 3.4445 * x - 4.7750 * cube + 2.0315 * x @ x.mT @ cube
    assert torch.allclose(orthogonalise(matrices).double(), x, atol=1e-4)


def test_muon_equals_torch_on_hidden_matrices_and_adamw_on_the_rest():
    """torch's Muon iterates in bfloat16, ours in float32 on CPU: equal up to that."""
    ours, theirs = tiny(), tiny()
    muon = Muon(parameter_groups(ours), lr=0.02, adamw_lr=0.01, weight_decay=0.1)
    hidden = [p for name, p in theirs.named_parameters() if p.dim() == 2 and "proj" in name]
    chosen = {id(p) for p in hidden}
    rest = [p for p in theirs.parameters() if id(p) not in chosen]
    groups = [{"params": [p], "weight_decay": 0.1 if p is theirs.lm_head.weight else 0.0} for p in rest]
    references = [
        torch.optim.Muon(hidden, lr=0.02, weight_decay=0.1),
        torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95)),
    ]
    for step in range(3):
        for model, optimizers in ((ours, [muon]), (theirs, references)):
            generator = torch.Generator().manual_seed(step)
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            for optimizer in optimizers:
                optimizer.step()
    for start, a, b in zip(tiny().parameters(), ours.parameters(), theirs.parameters(), strict=True):
        with torch.no_grad():
            moved, apart = float((b - start).norm()), float((a - b).norm())
        assert apart < (0.03 if id(b) in chosen else 1e-5) * moved


def test_muon_state_survives_a_round_trip():
    def train(model, optimizer, steps):
        tokens = torch.arange(9)[None] % 11
        for _ in range(steps):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
            optimizer.step()

    whole, first, second = tiny(), tiny(), tiny()
    train(whole, Muon(parameter_groups(whole)), 4)
    optimizer = Muon(parameter_groups(first))
    train(first, optimizer, 2)
    second.load_state_dict(first.state_dict())
    resumed = Muon(parameter_groups(second))
    resumed.load_state_dict(optimizer.state_dict())
    train(second, resumed, 2)
    for a, b in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_muon_takes_its_step_counts_to_the_parameters_device():
    """The fused AdamW kernel wants them there; torch leaves them where the checkpoint was read otherwise."""
    here = tiny()
    optimizer = Muon(parameter_groups(here))
    here(torch.arange(3)[None]).sum().backward()
    optimizer.step()
    with torch.device("meta"):
        elsewhere = tiny()
    resumed = Muon(parameter_groups(elsewhere))
    resumed.load_state_dict(optimizer.state_dict())
    devices = {value.device.type for state in resumed.state.values() for value in state.values()}
    assert devices == {"meta"}


SHARDED = """
import os, sys
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import distribute_tensor
from dllm_var.model import Transformer, TransformerConfig
from dllm_var.model.sharding import shard
from dllm_var.model.transformer import Layer
from dllm_var.training.optim import Muon, parameter_groups

torch.set_num_threads(1)
dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))
torch.manual_seed(0)
config = TransformerConfig(hidden_size=10, num_layers=3, num_heads=2, head_dim=6, vocab_size=11, intermediate_size=7)
models = [Transformer(config), Transformer(config)]
shard(models[1], mesh)
for p in models[1].parameters():  # one of them with nothing on the second process
    assert p.to_local().shape[0] in (-(-p.shape[0] // 2), p.shape[0] // 2)
optimizers = [Muon(parameter_groups(m), lr=0.02, adamw_lr=0.01) for m in models]
for step in range(3):
    generator = torch.Generator().manual_seed(step)
    for whole, part in zip(models[0].parameters(), models[1].parameters(), strict=True):
        whole.grad = torch.randn(whole.shape, generator=generator)
        part.grad = distribute_tensor(whole.grad, part.device_mesh, part.placements)
    for optimizer in optimizers:
        optimizer.step()
for (name, whole), part in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
    torch.testing.assert_close(part.full_tensor(), whole, atol=1e-5, rtol=1e-5, msg=lambda m: f"{name}: {m}")

flat = FullyShardedDataParallel(
    Transformer(config), auto_wrap_policy=ModuleWrapPolicy({Layer}), use_orig_params=True, device_id=torch.device("cpu")
)
def roles(model):
    named = {id(p): n.replace("_fsdp_wrapped_module.", "") for n, p in model.named_parameters()}
    return {named[id(p)]: (g["role"], g.get("weight_decay")) for g in parameter_groups(model) for p in g["params"]}
assert any(p.dim() == 1 and "o_proj" in n for n, p in flat.named_parameters()), "FSDP1 no longer flattens"
assert roles(flat) == roles(models[0])
print("equal")
"""


@pytest.mark.slow
def test_muon_on_sharded_parameters_takes_the_steps_it_takes_on_whole_ones(tmp_path):
    """Three matrices of each shape and two processes: one gets two of them, and rows that do not divide by two."""
    script = tmp_path / "sharded.py"
    script.write_text(SHARDED)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0 and run.stdout.count("equal") == 2, run.stderr[-3000:]


def test_the_state_of_another_optimizer_or_of_other_groups_is_refused():
    def groups(*roles):
        return [{"params": [torch.nn.Parameter(torch.ones(2, 2))], "role": role} for role in roles]

    muon, adamw = Muon(groups("hidden", "rest")), AdamW(groups("hidden", "rest"))
    for theirs, ours in ((muon, adamw), (adamw, muon)):
        with pytest.raises(UserError, match=r"another optimizer.*model\.init_from"):
            ours.load_state_dict(theirs.state_dict())
    with pytest.raises(UserError, match="another model"):
        muon.load_state_dict(Muon(groups("rest", "hidden")).state_dict())
    muon.load_state_dict(Muon(groups("hidden", "rest")).state_dict())
