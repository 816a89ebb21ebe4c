#!/usr/bin/env bash
# ShuffleNetV2 1.0x on eight cards: fine-tunes a checkpoint (--resume=FILE, by default the bundle's model_best.pth.tar) on
# another data set; a head of another number of classes starts fresh. Nothing was published for this.
exec bash "$(dirname "$0")/../../common/launch.sh" "$0" "$@" -- \
    --epochs 10 --batch-size 256 --cpu-batch-size 32 --lr 0.05 --warmup-epochs 1 --momentum 0.9 --wd 1e-4 \
    --color-jitter 0.2 --amp --opt-level O2 --loss-scale 64
