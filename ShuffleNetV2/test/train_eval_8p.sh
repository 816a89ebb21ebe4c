#!/usr/bin/env bash
# ShuffleNetV2 1.0x on eight cards: accuracy of a checkpoint (--resume=FILE, by default the bundle's model_best.pth.tar).
# Published: Acc@1 66.246 for eight NPUs (ModelZoo), 69.362 for torchvision's weights.
exec bash "$(dirname "$0")/../../common/launch.sh" "$0" "$@" -- \
    --batch-size 256 --cpu-batch-size 32
