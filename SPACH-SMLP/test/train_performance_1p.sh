#!/usr/bin/env bash
# sMLPNet-T on one card: throughput over 1 epoch, on synthetic images unless --data_path names a data set.
# Published for NPUs: 211 images/s (ModelZoo, torch 1.8, O1).
exec bash "$(dirname "$0")/../../common/launch.sh" "$0" "$@" -- \
    --arch smlpnet_tiny --epochs 1 --batch-size 112 --cpu-batch-size 8 --cpu-max-steps 16 --lr 5e-4 \
    --warmup-epochs 20 --cooldown-epochs 10 --weight-decay 0.05 --label-smoothing 0.1 --aa rand-m9-mstd0.5-inc1 \
    --reprob 0.25 --mixup 0.8 --cutmix 1.0 --repeats 3 --ema-decay 0.99996 --amp --opt-level O1 \
    --loss-scale dynamic --eval-freq 0 --no-save
