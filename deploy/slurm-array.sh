#!/bin/bash
# Build an index by a job array: sbatch --array=0-7 deploy/slurm-array.sh
# Its tasks share the work through the index directory, so they may start at any time, and any of them may be requeued.
#SBATCH --job-name=gradtrace-build
#SBATCH --cpus-per-task=4
#SBATCH --gpus-per-task=1
#SBATCH --mem=32G
#SBATCH --time=12:00:00
#SBATCH --requeue
set -euo pipefail

: "${TASK:?the task, such as tasks.py:TASK}" "${CHECKPOINTS:?directory of the checkpoints}" "${INDEX:?directory of the index, on storage that all nodes share}"

exec gradtrace build "$TASK" --checkpoints "$CHECKPOINTS" --out "$INDEX" --rank env
