#!/usr/bin/env bash
# PNASNet-5-Large on eight cards: 1000 more steps from a finished checkpoint (--resume=FILE, by default the newest
# model_best.pth.tar), with the learning rate of its last epoch, 0.4 x 0.97^89. A head of another number of classes
# starts fresh. Nothing was published for this.
exec bash "$(dirname "$0")/../../common/launch.sh" "$0" "$@" -- \
    --epochs 1000 --max-steps 1000 --batch-size 32 --cpu-batch-size 4 --cpu-max-steps 20 --lr 0.0266 --lr-decay 1 \
    --momentum 0.9 --weight-decay 4e-5 --aux-weight 0.4 --drop-path 0 --dropout 0.5 --amp --opt-level O2 \
    --loss-scale 32
