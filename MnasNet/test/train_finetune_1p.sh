#!/usr/bin/env bash
# MnasNet 1.0 on one card: fine-tunes a checkpoint (--resume=FILE, by default the bundle's model_best.pth.tar) on
# another data set; a head of another number of classes starts fresh. Nothing was published for this.
exec bash "$(dirname "$0")/../../common/launch.sh" "$0" "$@" -- \
    --epochs 10 --batch-size 128 --cpu-batch-size 32 --lr 0.05 --warmup-epochs 1 --momentum 0.9 --weight-decay 1e-5 \
    --label-smoothing 0.1 --bn-momentum 0.1 --amp --opt-level O1 --loss-scale dynamic
