#!/usr/bin/env bash
# SPNASNet-100 on one card, 150 epochs. No credible Acc@1 is published for it (timm's recipe: 74.086); 467.886 images/s for NPUs (ModelZoo, O2).
# The published 1p script has --lr 0.4, the rate of eight cards; 0.05 is that rate for the batch of one.
exec bash "$(dirname "$0")/../../common/launch.sh" "$0" "$@" -- \
    --arch spnasnet_100 --epochs 150 --batch-size 256 --cpu-batch-size 32 --lr 0.05 --warmup-epochs 5 \
    --momentum 0.9 --weight_decay 1e-4 --label-smoothing 0.1 --color-jitter 0.4 --reprob 0.5 --amp --opt-level O2 \
    --loss-scale dynamic
