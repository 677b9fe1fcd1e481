#!/bin/bash
# Build an index on a running Ray cluster, from one of its machines: deploy/ray-job.sh
# All machines see the task, the checkpoints and the index at the same paths.
set -euo pipefail

: "${TASK:?the task, such as /data/tasks.py:TASK}" "${CHECKPOINTS:?directory of the checkpoints}" "${INDEX:?directory of the index}"

exec gradtrace build "$TASK" --checkpoints "$CHECKPOINTS" --out "$INDEX" --ray "${RAY_ADDRESS:-auto}"
