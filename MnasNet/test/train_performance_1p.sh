#!/usr/bin/env bash
# MnasNet 1.0 on one card: throughput over 6 epochs, on synthetic images unless --data_path names a data set.
# Published for NPUs: 2569.8 images/s (ModelZoo, torch 1.8, O1).
exec bash "$(dirname "$0")/../../common/launch.sh" "$0" "$@" -- \
    --arch mnasnet1_0 --epochs 6 --batch-size 512 --cpu-batch-size 16 --cpu-max-steps 30 --lr 0.7 --warmup-epochs 5 \
    --momentum 0.9 --weight-decay 1e-5 --label-smoothing 0.1 --bn-momentum 0.1 --amp --opt-level O1 \
    --loss-scale dynamic --eval-freq 0 --no-save
