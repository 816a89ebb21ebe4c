#!/usr/bin/env bash
# ShuffleNetV2 1.0x on one card: throughput over 2 epochs, on synthetic images unless --data_path names a data set.
# Published for NPUs: 4345.273 images/s (ModelZoo, torch 1.8, O2).
exec bash "$(dirname "$0")/../../common/launch.sh" "$0" "$@" -- \
    --arch shufflenet_v2_x1_0 --epochs 2 --batch-size 1536 --cpu-batch-size 32 --cpu-max-steps 30 --lr 0.75 \
    --warmup-epochs 1 --momentum 0 --wd 3.0517578125e-05 --color-jitter 0.2 --amp --opt-level O2 --loss-scale 64 \
    --eval-freq 0 --no-save
