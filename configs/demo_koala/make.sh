#!/usr/bin/env bash
# Makes the demonstration's U-Nets, after the cascade's (configs/demo/make.sh): the autoencoder, a
# teacher of SDXL's structure, students of it, and the model folder runs/demo_koala/model.
# Usage: bash configs/demo_koala/make.sh
# Every step is skipped if its result is there, so the same command goes on after a stop.
set -euo pipefail
runs=runs/demo_koala

train() { # kind, name of a configuration: trains it, or goes on with it, or leaves it when done
  [ -f "$runs/$2/done" ] && return
  python -m train "$1" --config "configs/demo_koala/$3.yaml" --resume
  [ -f "$runs/$2/done" ] # a run that was told to stop ends the script as well
}

precompute() { # split, folder
  [ -f "$runs/$2/done" ] && return
  python -m train.data precompute --shards "data/demo/$1/*.tar" --out "$runs/$2" \
    --text weights/demo/text --autoencoder "$runs/autoencoder_kl/autoencoder_kl.safetensors"
  touch "$runs/$2/done"
}

student() { # name, recipe and what it needs
  [ -d "$runs/students/$1" ] && return
  local name=$1
  shift
  python -m train.distill make-student --teacher "$runs/unet/unet.safetensors" \
    --out "$runs/students/$name" --recipe "$@"
}

# Shipped, since teacher and students are worth nothing without the very one that they learned with.
if [ ! -f "$runs/autoencoder_kl/autoencoder_kl.safetensors" ] && [ -f weights/demo-koala/autoencoder_kl.safetensors ]; then
  mkdir -p "$runs/autoencoder_kl"
  cp weights/demo-koala/autoencoder_kl.safetensors "$runs/autoencoder_kl/"
  touch "$runs/autoencoder_kl/done"
fi
train autoencoder_kl autoencoder_kl autoencoder
precompute train cache
precompute test_combo cache_test_combo
train unet unet unet
student koala configs/distill/demo_koala.yaml
student bk configs/distill/demo_bk.yaml
student auto auto --max-params 32% --calibration configs/demo_koala/unet.yaml --calibration-size 32
train unet_kd unet_kd_koala unet_kd_koala
train unet_kd unet_kd_bk unet_kd_bk
train unet_kd unet_kd_auto unet_kd_auto
python -m train.assemble_unet --config configs/demo_koala/model.yaml --out "$runs/model"
