#!/usr/bin/env bash
#SBATCH --job-name=matris
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
# Several machines, one process per GPU, started by srun alone: sbatch examples/slurm_pretrain.sh
# Five minutes before the end Slurm sends SIGUSR1: the run saves and stops with status 143, the job queues itself again
# and goes on from there.
set -euo pipefail
: "${TRAIN:?export TRAIN, the training data, before sbatch}"
export OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-8}"
config="${CONFIG:-examples/configs/matris.yaml}"
output="${OUTPUT:-runs/matris}"

status=0
# shellcheck disable=SC2086  # TRAIN, VALID and TEST are lists
srun --kill-on-bad-exit=0 python -m matris train --config "$config" --training.output "$output" \
    --data.train $TRAIN ${VALID:+--data.valid $VALID} ${TEST:+--data.test $TEST} --data.num_workers 6 "$@" || status=$?
if [ "$status" -eq 143 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
