#!/usr/bin/env bash
# The main job: trains MatRIS from scratch, by default on an embedded demo set over two data-parallel processes.
#
#   bash examples/pretrain_matris.sh                                   the demo set, one to two minutes on two CPU cores
#   TRAIN=train.xyz bash examples/pretrain_matris.sh                   your data (10 % is set aside for validation)
#   TRAIN="a.h5 b.h5" VALID=v.h5 TEST=t.h5 NPROC=8 OUTPUT=runs/mine \
#       bash examples/pretrain_matris.sh --training.precision bf16-mixed --data.max_angles 200000
#
# Variables
#   TRAIN, VALID, TEST   files or stores, separated by blanks; without TRAIN the demo set is made and used
#   CONFIG               settings [examples/configs/demo.yaml; matris.yaml with TRAIN]
#   NPROC                processes on this machine, with GPUs one each [2]
#   OUTPUT               run directory [runs/demo; runs/matris with TRAIN]
#   RESTARTS             how often torchrun starts the processes again after one has died [0]
#   STEPS                updates, instead of the epochs of CONFIG
#   PYTHON               interpreter [python]
#   LD_PRELOAD, GLIBC_TUNABLES   an allocator, and settings of glibc's [on CPU those with least memory: allocator.sh]
# Arguments go to `janus-matris train`. A run that was stopped goes on when started again.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
python="${PYTHON:-python}"
nproc="${NPROC:-2}"

if [ -n "${TRAIN:-}" ]; then
    config="${CONFIG:-$here/configs/matris.yaml}"
    output="${OUTPUT:-runs/matris}"
else
    config="${CONFIG:-$here/configs/demo.yaml}"
    output="${OUTPUT:-runs/demo}"
    demo="$(dirname "$output")/demo_data"
    "$python" -c "import sys; from matris.data.demo import make_demo; make_demo(sys.argv[1])" "$demo"
    TRAIN="$demo/train.xyz" VALID="$demo/valid.xyz" TEST="$demo/test.xyz"
fi

# shellcheck disable=SC2206  # the variables are lists
arguments=(train --config "$config" --training.output "$output" --data.train $TRAIN)
# shellcheck disable=SC2206
[ -z "${VALID:-}" ] || arguments+=(--data.valid $VALID)
# shellcheck disable=SC2206
[ -z "${TEST:-}" ] || arguments+=(--data.test $TEST)
[ -z "${STEPS:-}" ] || arguments+=(--training.train_epochs null --training.train_iters "$STEPS")

# shellcheck source=examples/allocator.sh
source "$here/allocator.sh"
# Processes share the cores.
cores="$(getconf _NPROCESSORS_ONLN)"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores > nproc ? cores / nproc : 1))}"
if [ "$nproc" -eq 1 ]; then
    exec "$python" -m matris "${arguments[@]}" "$@"
fi
exec "$python" -m torch.distributed.run --standalone --nproc_per_node "$nproc" --max_restarts "${RESTARTS:-0}" -m matris "${arguments[@]}" "$@"
