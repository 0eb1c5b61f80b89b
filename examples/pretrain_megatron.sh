#!/usr/bin/env bash
# Trains MatRIS in the loop of Megatron-LM: its launchers, groups, gradient buffers, optimizer and checkpoints; our
# model, data and loss. Beside pretrain_matris.sh, which needs no Megatron-LM and can do more (docs/decisions/megatron.md).
#
#   git clone --branch core_v0.16.1 https://github.com/NVIDIA/Megatron-LM
#   MEGATRON=Megatron-LM TRAIN=train.h5 VALID=valid.h5 NPROC=8 bash examples/pretrain_megatron.sh \
#       --train-iters 100000 --global-batch-size 256 --tensor-model-parallel-size 2 --context-parallel-size 2
#
# Variables
#   MEGATRON             folder of Megatron-LM; empty where it is installed already
#   TRAIN, VALID, TEST   files or stores, separated by blanks
#   CONFIG               our settings: defaults of Megatron's options, too [examples/configs/matris.yaml]
#   SAVE                 checkpoints of Megatron, which a job goes on from [runs/megatron]
#   SAVE_INTERVAL        iterations between them [1000]
#   NPROC                processes on this machine, one GPU each; ignored where a launcher has started this script [8]
#   PYTHON               interpreter [python]
# Arguments go to Megatron, whose options are all there, and to us: --data.*, --model.*, --loss.*, --matris-preset,
# --matris-init-from (python -m matris.megatron --help). Several machines: examples/slurm_pretrain.sbatch with
# COMMAND="bash examples/pretrain_megatron.sh", or torchrun as for any Megatron job.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
python="${PYTHON:-python}"
: "${TRAIN:?set TRAIN to the training data}"
[ -z "${MEGATRON:-}" ] || export PYTHONPATH="$MEGATRON${PYTHONPATH:+:$PYTHONPATH}"
# Megatron asks for it where matrix products are shared, so that sends and products start in the order they were asked.
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"

save="${SAVE:-runs/megatron}"
# shellcheck disable=SC2206  # the variables are lists
arguments=(--matris-config "${CONFIG:-$here/configs/matris.yaml}" --data.train $TRAIN
    --save "$save" --load "$save" --save-interval "${SAVE_INTERVAL:-1000}")
# shellcheck disable=SC2206
[ -z "${VALID:-}" ] || arguments+=(--data.valid $VALID)
# shellcheck disable=SC2206
[ -z "${TEST:-}" ] || arguments+=(--data.test $TEST)

if [ -n "${SLURM_STEP_ID:-}" ] && [ -z "${RANK:-}" ]; then # one task per GPU, started by srun
    export RANK="$SLURM_PROCID" WORLD_SIZE="$SLURM_NTASKS" LOCAL_RANK="$SLURM_LOCALID"
fi
if [ -n "${RANK:-}" ]; then
    exec "$python" -m matris.megatron "${arguments[@]}" "$@"
fi
exec "$python" -m torch.distributed.run --standalone --nproc_per_node "${NPROC:-8}" -m matris.megatron \
    "${arguments[@]}" "$@"
