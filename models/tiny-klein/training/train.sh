#!/bin/sh
# Trains both models from scratch: models/tiny-klein/training/train.sh [WORK]
# Needs the `train` extra. It takes about six hours on two CPU cores that multiply bfloat16 fast.
set -eu
cd "$(dirname "$0")"
work=${1:-/tmp/tiny-klein}
mkdir -p "$work"
python train_vae.py "$work"
python make_pool.py "$work"
python train_text.py "$work"
python train_flow.py "$work"
python distill.py "$work"
python refine_decoder.py "$work"
python assemble.py "$work" ..
python assemble.py "$work" ../../tiny-klein-base --base
python plot.py "$work" logs
# Score a copy, since the exported graphs are written into the model directory.
cp -r .. "$work/model"
python evaluate.py "$work/model" --sheet ../contact-sheet.png
