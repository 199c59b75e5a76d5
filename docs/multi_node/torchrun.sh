#!/usr/bin/env bash
# The same command on every node:
#   NODES=2 PROCESSES=8 HEAD=first-node bash docs/multi_node/torchrun.sh --config configs/cmudict.yaml [--key=value ...]
# NODES     how many there are (1)
# PROCESSES per node: its GPUs (1)
# HEAD      one of the nodes, for the others to meet at (this one)
# RESTARTS  how often all processes are started again, from the newest checkpoint, after one has failed (0)
set -euo pipefail
nodes=${NODES:-1} processes=${PROCESSES:-1}

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec python -m torch.distributed.run \
  --nnodes="$nodes" --nproc-per-node="$processes" --max-restarts="${RESTARTS:-0}" \
  --rdzv-backend=c10d --rdzv-endpoint="${HEAD:-localhost}:${PORT:-29500}" --rdzv-id="${RUN:-dllm-var}" \
  -m dllm_var fit "$@" \
  --config "configs/strategy/${STRATEGY:-ddp}.yaml" \
  --trainer.num_nodes="$nodes" --trainer.devices="$processes"
