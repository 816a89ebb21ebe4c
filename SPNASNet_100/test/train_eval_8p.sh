#!/usr/bin/env bash
# SPNASNet-100 on eight cards: accuracy of a checkpoint (--resume=FILE, by default the bundle's model_best.pth.tar).
# Best published: Acc@1 74.96 (its paper), 74.086 (timm, with bilinear interpolation; here it is bicubic).
exec bash "$(dirname "$0")/../../common/launch.sh" "$0" "$@" -- \
    --batch-size 256 --cpu-batch-size 32
