#!/usr/bin/env bash
# ShuffleNetV2 1.0x on eight cards, 240 epochs. Published for eight NPUs: Acc@1 66.246 (69.55 by mmpretrain's recipe);
# for eight cards: 17329.326 images/s (ModelZoo, torch 1.8, O2).
exec bash "$(dirname "$0")/../../common/launch.sh" "$0" "$@" -- \
    --arch shufflenet_v2_x1_0 --epochs 240 --batch-size 1024 --cpu-batch-size 32 --lr 4 --warmup-epochs 5 \
    --momentum 0 --wd 1e-4 --color-jitter 0.2 --amp --opt-level O2 --loss-scale 64
