#!/usr/bin/env bash
# Fine-tunes a model on other data. Its predictions are verified before the first update, and its reference energies are
# kept unless told otherwise (--data.reference_energies fit, for data of another level of theory).
#
#   BASE=runs/demo/best TRAIN=train.xyz bash examples/finetune_matris.sh
#   BASE=models/10M TRAIN=a.h5 VALID=v.h5 TEST=t.h5 NPROC=4 bash examples/finetune_matris.sh --optim.lr 5e-5
#
# Variables: BASE, the model directory; all others as in pretrain_matris.sh.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
: "${BASE:?set BASE to a model directory, such as runs/demo/best}"
: "${TRAIN:?set TRAIN to the training data}"
CONFIG="${CONFIG:-$here/configs/finetune.yaml}" OUTPUT="${OUTPUT:-runs/finetune}" \
    exec bash "$here/pretrain_matris.sh" --init_from "$BASE" "$@"
