#!/usr/bin/env bash
# sMLPNet-T on one card, 300 epochs and 10 of cool-down. Expected: Acc@1 81.9 (microsoft/SPACH), 80.90 for eight NPUs;
# 211 images/s for NPUs (ModelZoo, torch 1.8, O1).
exec bash "$(dirname "$0")/../../common/launch.sh" "$0" "$@" -- \
    --arch smlpnet_tiny --epochs 310 --batch-size 112 --cpu-batch-size 16 --lr 5e-4 --warmup-epochs 20 \
    --cooldown-epochs 10 --weight-decay 0.05 --label-smoothing 0.1 --aa rand-m9-mstd0.5-inc1 --reprob 0.25 \
    --mixup 0.8 --cutmix 1.0 --repeats 3 --ema-decay 0.99996 --amp --opt-level O1 --loss-scale dynamic
