#!/usr/bin/env bash
# From nothing to a trained and evaluated model: scripts/quickstart.sh [FOLDER, default ./demo_run].
# Installs into ./.venv, makes the demo set, trains on two processes (or on the GPUs found), evaluates, prints a table.
# Under 10 minutes on 2 CPU cores. Run again, it keeps environment and data, and trains another run.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
folder=$(realpath -m "${1:-$project/demo_run}")
cd "$project"
started=$SECONDS
stage() { say "[$1/4, $((SECONDS - started)) s] $2"; }

stage 1 "environment"
prepare_environment demo

stage 2 "demo set: photographs -> EfficientNet-Lite embeddings -> shards in $folder/data"
blip3o-ds data demo "$folder/data"

if has_nvidia_gpu; then
    processes=$(nvidia-smi -L | wc -l)
    devices="$processes GPUs"
else
    processes=2
    devices="2 CPU processes"
    # Divide the cores among the processes: more threads than cores would wait for each other.
    export OMP_NUM_THREADS=$((($(nproc) + 1) / 2))
fi
stage 3 "training on $devices (deepspeed launcher, ZeRO-2, bf16)"
mkdir -p "$folder"
deepspeed --num_gpus "$processes" scripts/train_clip_reproduction.py \
    --chunked_embeddings_dir "$folder/data/train" --output_dir "$folder/runs" --model_size demo \
    --deepspeed_config ds_configs/zero2.json \
    --set "data.eval_dirs=[$folder/data/heldout_images, $folder/data/heldout_crops]" \
    2>&1 | tee "$folder/launcher.log" | grep --line-buffered -v '^\[20'  # the launcher's own messages are only in the log

run=$(ls -d "$folder"/runs/clip_repro_* | tail -n 1)
stage 4 "evaluation of $run"
python scripts/show_run.py "$run"
say "done in $((SECONDS - started)) s. The curves:"
echo "source $project/.venv/bin/activate && tensorboard --logdir $folder/runs"
