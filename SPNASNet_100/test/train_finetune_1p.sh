#!/usr/bin/env bash
# SPNASNet-100 on one card: fine-tunes a checkpoint (--resume=FILE, by default the bundle's model_best.pth.tar) on
# another data set; a head of another number of classes starts fresh. Nothing was published for this.
exec bash "$(dirname "$0")/../../common/launch.sh" "$0" "$@" -- \
    --epochs 10 --batch-size 128 --cpu-batch-size 32 --lr 0.02 --warmup-epochs 1 --momentum 0.9 --weight_decay 1e-4 \
    --label-smoothing 0.1 --color-jitter 0.4 --reprob 0.5 --amp --opt-level O2 --loss-scale dynamic
