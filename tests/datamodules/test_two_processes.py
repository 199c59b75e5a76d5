"""Two processes share the rows of packed and streamed data, and go on where they stopped."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_data_module import HELD_OUT, WORDS, check, make

HERE = Path(__file__).parent
SCRIPT = """
import json, sys
from recorded_runs import ListSource
from test_data_module import HELD_OUT, make, run
from test_streaming import RECORDS, train

if __name__ == "__main__":
    two = {"devices": 2, "strategy": "ddp"}
    seen = [run(sys.argv[1], make(splits=HELD_OUT, overhang=3, packing="best_fit"), **two)]
    source = ListSource(RECORDS)
    for steps, checkpoint in ((8, None), (3, None), (8, sys.argv[1] + "/3.ckpt")):
        seen.append(train(sys.argv[1], source, steps, checkpoint, two)[0])
    import torch.distributed as dist
    with open(f"{sys.argv[1]}/rank{dist.get_rank()}.json", "w") as file:  # two processes on one stdout would mix
        json.dump(seen, file)
"""


@pytest.mark.slow
def test_two_processes_share_the_rows_and_resume_exactly(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    paths = os.pathsep.join([str(HERE), str(HERE.parent), str(HERE.parent.parent), os.environ.get("PYTHONPATH", "")])
    command, environment = [sys.executable, "script.py", str(tmp_path)], {**os.environ, "PYTHONPATH": paths}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(f"data: {len(WORDS)} samples") == 1, "the summary is shown once"
    by_rank = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    check(by_rank[0][0], make(splits=HELD_OUT, overhang=3, packing="best_fit"), 2)
    for _, whole, before, after in by_rank:
        assert before + after == whole
    assert by_rank[0][1] != by_rank[1][1]
