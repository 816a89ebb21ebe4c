#!/usr/bin/env bash
# sMLPNet-T on eight cards: fine-tunes a checkpoint (--resume=FILE, by default the bundle's model_best.pth.tar) on
# another data set; a head of another number of classes starts fresh. Nothing was published for this.
exec bash "$(dirname "$0")/../../common/launch.sh" "$0" "$@" -- \
    --epochs 10 --batch-size 112 --cpu-batch-size 16 --lr 1e-4 --warmup-epochs 1 --weight-decay 0.05 \
    --label-smoothing 0.1 --aa rand-m9-mstd0.5-inc1 --reprob 0.25 --mixup 0.8 --cutmix 1.0 --repeats 3 \
    --ema-decay 0.99996 --amp --opt-level O1 --loss-scale dynamic
