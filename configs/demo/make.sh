#!/usr/bin/env bash
# Makes the demonstration cascade again, from the zip files of the data to weights/demo.
# Usage: bash configs/demo/make.sh FOLDER_WITH_THE_ZIPS
# Every step is skipped if its result is there, so the same command goes on after a stop.
set -euo pipefail
data=${1:?usage: bash configs/demo/make.sh FOLDER_WITH_THE_ZIPS}
shards=data/demo
cache=runs/demo/cache

for split in train test test_combo test_concept; do
  for set in emoji grocery clothing; do
    case "$set-$split" in
      emoji-test | grocery-test_* | clothing-test_*) continue ;; # splits that the set does not have
    esac
    [ -f "$shards/$split/$set-000000.tar" ] && continue # a set's shards appear together
    background=0
    [ "$set-$split" = emoji-train ] && background=0.2
    python -m train.data write --from "$data/$set.zip" --out "$shards/$split" --name "$set" \
      --split "$split" --size 128 --background-variants "$background"
  done
done

train() { # name of a configuration: trains it, or goes on with it, or leaves it when it is done
  [ -f "runs/demo/$1/done" ] && return
  python -m train "${1%_joint}" --config "configs/demo/$1.yaml" --resume
  [ -f "runs/demo/$1/done" ] # a run that was told to stop ends the script as well
}

precompute() { # name of the step, and what encodes
  local done_file=$cache/$1.done
  [ -f "$done_file" ] && return
  shift
  python -m train.data precompute --shards "$shards/train/*.tar" --out "$cache" "$@"
  touch "$done_file"
}

train clip
precompute text --text runs/demo/clip/text
precompute image --image runs/demo/clip/text
train stage_a
precompute stage_a --stage-a runs/demo/stage_a/stage_a.safetensors

# Stage B and the compressor together; then the compressor learns to keep more, with the previewer
# as its decoder, and Stage B goes on with its latents.
train stage_b_joint
train compressor
precompute stage_c --compressor runs/demo/compressor/compressor.safetensors
train stage_b
# What Stage C is judged by while it learns.
[ -f "$cache/validation.done" ] || python -m train.data precompute \
  --shards "$shards/test_combo/*.tar" --out runs/demo/cache_test_combo \
  --text runs/demo/clip/text --compressor runs/demo/compressor/compressor.safetensors
touch "$cache/validation.done"
train stage_c
python -m train.assemble --config configs/demo/model.yaml --out weights/demo

# Its Stage C in four steps, which the whole teaches; then it is put together anew, with both.
few=runs/demo/step_distil_stage_c_four
[ -f "$few/done" ] || python -m train step_distil \
  --config configs/step_distil/demo_stage_c_four.yaml --run.seed 2 --resume
[ -f "$few/done" ]
python -m train.assemble --config configs/demo/model.yaml --out weights/demo \
  --stage_c_few "$few/stage_c.safetensors" --max_mb 56
