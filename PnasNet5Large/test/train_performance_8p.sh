#!/usr/bin/env bash
# PNASNet-5-Large on eight cards: throughput over 1000 steps, on synthetic images unless --data_path names a data set.
# Published for NPUs: 353 images/s (ModelZoo, torch 1.8, O2; an error kept its drop path from acting, hence 0 here).
exec bash "$(dirname "$0")/../../common/launch.sh" "$0" "$@" -- \
    --arch pnasnet5large --epochs 1 --max-steps 1000 --batch-size 32 --cpu-batch-size 2 --cpu-max-steps 8 --lr 0.4 \
    --lr-decay 0.97 --momentum 0.9 --weight-decay 4e-5 --aux-weight 0.4 --drop-path 0 --dropout 0.5 --amp \
    --opt-level O2 --loss-scale dynamic --eval-freq 0 --no-save --print-freq 4
