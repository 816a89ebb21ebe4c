#!/usr/bin/env bash
# ShuffleNetV2 1.0x on eight cards: throughput over 1 epoch, on synthetic images unless --data_path names a data set.
# Published for NPUs: 17329.326 images/s (ModelZoo, torch 1.8, O2).
exec bash "$(dirname "$0")/../../common/launch.sh" "$0" "$@" -- \
    --arch shufflenet_v2_x1_0 --epochs 1 --batch-size 1024 --cpu-batch-size 32 --cpu-max-steps 30 --lr 4 \
    --warmup-epochs 5 --momentum 0 --wd 1e-4 --color-jitter 0.2 --amp --opt-level O2 --loss-scale 64 --eval-freq 0 \
    --no-save
