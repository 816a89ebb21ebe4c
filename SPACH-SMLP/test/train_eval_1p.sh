#!/usr/bin/env bash
# sMLPNet-T on one card: accuracy of a checkpoint (--resume=FILE, by default the bundle's model_best.pth.tar).
# Published: Acc@1 81.9 (microsoft/SPACH), 80.90 for eight NPUs (ModelZoo).
exec bash "$(dirname "$0")/../../common/launch.sh" "$0" "$@" -- \
    --batch-size 112 --cpu-batch-size 16
