"""The head's loss where processes share the vocabulary, against torch's cross-entropy on all of it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from dllm_var.objectives.cross_entropy import head_loss, summed_cross_entropy

torch.set_num_threads(1)
dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tensor_parallel",))
close = dict(atol=1e-13, rtol=1e-12)
for vocabulary in (12, 13):  # six tokens each; seven and six
    for positions, weighted in ((9, True), (9, False), (0, True)):
        generator = torch.Generator().manual_seed(vocabulary)
        matrix = torch.randn(vocabulary, 6, generator=generator, dtype=torch.float64)
        matrix[-1], matrix[2] = matrix[0], 0  # equal logits on both processes
        hidden = torch.randn(positions, 6, generator=generator, dtype=torch.float64)
        targets = torch.randint(vocabulary, (positions,), generator=generator)
        if positions:
            hidden[:2], hidden[4:6] = 0, 3 * matrix[0]  # all are the best; the first and the last
            targets[:2], targets[2], targets[4:6] = torch.tensor([0, 8]), 2, torch.tensor([0, vocabulary - 1])
            hidden[3] = hidden[3] * 1e3  # exponentials that overflow unless the largest logit of both is taken away
        weights = torch.rand(positions, generator=generator, dtype=torch.float64) if weighted else None

        alone = [tensor.clone().requires_grad_() for tensor in (hidden, matrix)]
        logits = alone[0] @ alone[1].t()
        losses = F.cross_entropy(logits, targets, reduction="none")
        (losses if weights is None else losses * weights).sum().backward()

        head = nn.Linear(6, vocabulary, bias=False)
        head.weight = nn.Parameter(distribute_tensor(matrix, mesh, [Shard(0)]))
        shared = hidden.clone().requires_grad_()
        scores = summed_cross_entropy(head, shared, targets, weights, logits_per_chunk=2 * vocabulary)
        (scores.loss_sum * 3).backward()
        torch.testing.assert_close(scores.token_loss, losses.detach(), **close)
        torch.testing.assert_close(shared.grad, 3 * alone[0].grad, **close)
        torch.testing.assert_close(head.weight.grad.full_tensor(), 3 * alone[1].grad, **close)

        whole = nn.Linear(6, vocabulary, bias=False)
        whole.weight = nn.Parameter(matrix)
        assert torch.equal(scores.correct, summed_cross_entropy(whole, hidden, targets, weights).correct)
        assert torch.equal(scores.correct, logits.argmax(dim=-1) == targets)
        if positions:
            assert scores.correct[[0, 1, 4, 5]].tolist() == [True, False, True, False]
print("equal")
"""


@pytest.mark.slow
def test_two_processes_that_share_a_vocabulary_come_to_the_loss_and_gradients_of_one(tmp_path):
    """With a vocabulary that does not divide, ties between the processes, chunks, and no position at all."""
    (tmp_path / "shared.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [*command, str(tmp_path / "shared.py")], env=environment, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0 and run.stdout.count("equal") == 2, run.stderr[-3000:]
