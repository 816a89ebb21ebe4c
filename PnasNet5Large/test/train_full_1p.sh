#!/usr/bin/env bash
# PNASNet-5-Large (Ascend's variant) on one card, 90 epochs. Published for eight NPUs: Acc@1 79.625; for one card:
# 69 images/s (ModelZoo, torch 1.8, O2). An error kept its drop path of 0.4 from acting, hence 0 here.
# Its program followed a cosine instead of --lr-decay: --schedule cosine does.
exec bash "$(dirname "$0")/../../common/launch.sh" "$0" "$@" -- \
    --arch pnasnet5large --epochs 90 --batch-size 32 --cpu-batch-size 4 --lr 0.4 --lr-decay 0.97 --momentum 0.9 \
    --weight-decay 4e-5 --aux-weight 0.4 --drop-path 0 --dropout 0.5 --amp --opt-level O2 --loss-scale dynamic
