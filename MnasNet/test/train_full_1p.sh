#!/usr/bin/env bash
# MnasNet 1.0 on one card, 300 epochs.
# Published for NPUs, eight cards: Acc@1 72.819; for one card: 2569.8 images/s (ModelZoo, torch 1.8, O1).
exec bash "$(dirname "$0")/../../common/launch.sh" "$0" "$@" -- \
    --arch mnasnet1_0 --epochs 300 --batch-size 512 --cpu-batch-size 32 --lr 0.7 --warmup-epochs 5 \
    --momentum 0.9 --weight-decay 1e-5 --label-smoothing 0.1 --bn-momentum 0.1 --amp --opt-level O1 --loss-scale dynamic
