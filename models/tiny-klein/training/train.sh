#!/bin/sh
# All of the training, from nothing to both models: models/tiny-klein/training/train.sh [WORK]
# Needs the `train` extra. On two CPU cores that multiply bfloat16 fast it takes about six hours.
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
# Scores of a copy, as graphs are written into it.
cp -r .. "$work/model"
python evaluate.py "$work/model" --sheet ../contact-sheet.png
