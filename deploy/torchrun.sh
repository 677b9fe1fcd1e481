#!/bin/bash
# Build an index on the GPUs of this machine, one worker on each: deploy/torchrun.sh 8
set -euo pipefail

: "${TASK:?the task, such as tasks.py:TASK}" "${CHECKPOINTS:?directory of the checkpoints}" "${INDEX:?directory of the index}"

# shellcheck disable=SC2016  # LOCAL_RANK is another one in each worker
exec torchrun --standalone --nproc-per-node "${1:-auto}" --no-python \
  bash -c 'exec gradtrace build "$0" --checkpoints "$1" --out "$2" --rank env --device "${DEVICE:-cuda:$LOCAL_RANK}"' \
  "$TASK" "$CHECKPOINTS" "$INDEX"
