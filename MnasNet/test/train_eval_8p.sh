#!/usr/bin/env bash
# MnasNet 1.0 on eight cards: accuracy of a checkpoint (--resume=FILE, by default the bundle's model_best.pth.tar).
# Published after 300 epochs on eight NPUs: Acc@1 72.819 (ModelZoo).
exec bash "$(dirname "$0")/../../common/launch.sh" "$0" "$@" -- \
    --batch-size 256 --cpu-batch-size 32
