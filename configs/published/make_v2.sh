#!/usr/bin/env bash
# Trains Würstchen v2 from nothing, each phase from the one before.
# Usage: bash configs/published/make_v2.sh [OPTIONS OF EVERY RUN]
#   such as --data.shards "s3://mine/{00000..00999}.tar" --run.devices 64 --run.accumulate 1
# Every step is skipped if its result is there, so the same command goes on after a stop.
# models/ needs torchvision's efficientnet_v2_s-dd5fe13b.pth and a folder of CLIP ViT-L/14.
set -euo pipefail

train() { # kind and name of a configuration: trains it, or goes on with it, or leaves it when done
  local kind=$1 name=$2
  shift 2
  [ -f "runs/published/$name/done" ] && return
  python -m train "$kind" --config "configs/published/$name.yaml" --resume "$@"
  [ -f "runs/published/$name/done" ] # a run that was told to stop ends the script as well
}

train stage_a stage_a "$@"
for phase in 1 2; do
  train stage_b "stage_b_v2_phase$phase" "$@"
done
for phase in 1 2 3 4; do
  train stage_c "stage_c_v2_phase$phase" "$@"
done
# The published default is the mean of base (phase 3) and finetuned (phase 4).
python -m cascade.tools average \
  runs/published/stage_c_v2_phase3/stage_c.safetensors \
  runs/published/stage_c_v2_phase4/stage_c.safetensors \
  --weights 0.5 0.5 --out runs/published/stage_c_v2.safetensors
