#!/usr/bin/env bash
# PNASNet-5-Large on one card: accuracy of a checkpoint (--resume=FILE, by default the newest model_best.pth.tar).
# Published: Acc@1 79.625 for eight NPUs (ModelZoo); 82.736 for Cadene's weights, with --zero-pad.
exec bash "$(dirname "$0")/../../common/launch.sh" "$0" "$@" -- \
    --batch-size 32 --cpu-batch-size 4
