#!/usr/bin/env bash
# SPNASNet-100 on eight cards: throughput over 1 epoch, on synthetic images unless --data_path names a data set.
# Published for NPUs: 3860.241 images/s (ModelZoo, torch 1.8, O2).
exec bash "$(dirname "$0")/../../common/launch.sh" "$0" "$@" -- \
    --arch spnasnet_100 --epochs 1 --batch-size 256 --cpu-batch-size 16 --cpu-max-steps 30 --lr 0.4 \
    --warmup-epochs 5 --momentum 0.9 --weight_decay 1e-4 --label-smoothing 0.1 --color-jitter 0.4 --reprob 0.5 \
    --amp --opt-level O2 --loss-scale dynamic --eval-freq 0 --no-save
