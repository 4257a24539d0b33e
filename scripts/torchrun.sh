#!/usr/bin/env bash
# Train on one or several machines, and go on when one of them fails. Edit the settings, then start this on every machine:
#
#   scripts/torchrun.sh configs/imagenet/pretrain_dino_vil2_tiny.yaml --data.root /data/imagenet
#
# What follows the recipe is handed to main.py. When a process dies, torchrun stops the others and starts all of them again,
# at most MAX_RESTARTS times; the run goes on from its newest good checkpoint (--resume auto), with the same images per
# optimiser step on whatever machines are left (global_batch_size in the recipe).
set -euo pipefail

# --- settings: from the environment, or from here ----------------------------------------------------------------------

NODES="${NODES:-1}"                          # machines: a number, or MIN:MAX to go on with fewer and take on new ones
GPUS="${GPUS:-gpu}"                          # processes per machine: a number, or gpu for as many as there are GPUs
HOST="${HOST:-localhost:29500}"              # where the machines meet: one of them and a free port, the same on all
LOCAL_ADDR="${LOCAL_ADDR:-}"                 # this machine's address, where its own name does not resolve on the others
RUN_ID="${RUN_ID:-vil}"                      # tells jobs apart that meet at the same place
MAX_RESTARTS="${MAX_RESTARTS:-3}"
ACCELERATOR="${ACCELERATOR:-gpu}"            # cpu to try it out (with GPUS=2)
PYTHON="${PYTHON:-python}"

# --- what a hanging collective leaves behind ---------------------------------------------------------------------------
# NCCL gives up on a collective after 10 minutes (torch's default) and ends the process, which makes torchrun restart; the last
# 2,000 collectives of every process are then in files, to be read with `torchfrtrace <folder>`.

FLIGHT_RECORDER="${FLIGHT_RECORDER:-logs/flight_recorder/$RUN_ID}"
mkdir -p "$FLIGHT_RECORDER"
export TORCH_NCCL_TRACE_BUFFER_SIZE="${TORCH_NCCL_TRACE_BUFFER_SIZE:-2000}"
export TORCH_FR_BUFFER_SIZE="${TORCH_FR_BUFFER_SIZE:-$TORCH_NCCL_TRACE_BUFFER_SIZE}"  # its name in newer versions of torch
export TORCH_NCCL_DUMP_ON_TIMEOUT="${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}"
export TORCH_NCCL_DEBUG_INFO_TEMP_FILE="${TORCH_NCCL_DEBUG_INFO_TEMP_FILE:-$FLIGHT_RECORDER/$(hostname)_rank_}"
export TORCH_FR_DUMP_TEMP_FILE="${TORCH_FR_DUMP_TEMP_FILE:-$TORCH_NCCL_DEBUG_INFO_TEMP_FILE}"
export TORCH_NCCL_ASYNC_ERROR_HANDLING="${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}"
# A store of their own for every start of the processes: in one that the agents share for good, gloo finds the addresses of those
# that have died, and waits for them.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE="${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-1}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

# -----------------------------------------------------------------------------------------------------------------------

if [[ $# -lt 1 ]]; then
    echo "usage: [NODES=1 GPUS=gpu HOST=localhost:29500 ...] $0 RECIPE.yaml [arguments of main.py fit]" >&2
    exit 2
fi
recipe="$1"
shift
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# torchrun tells each process the world it is in; Lightning believes num_nodes and devices, which must multiply to it. With
# MIN:MAX, that number is known only inside, so the processes set it from their environment.
# shellcheck disable=SC2016  # what is in single quotes is expanded there
exec "$PYTHON" -m torch.distributed.run \
    --nnodes "$NODES" --nproc-per-node "$GPUS" --max-restarts "$MAX_RESTARTS" \
    --rdzv-backend c10d --rdzv-endpoint "$HOST" --rdzv-id "$RUN_ID" ${LOCAL_ADDR:+--local-addr "$LOCAL_ADDR"} \
    --no-python bash -c '
        exec "$0" main.py fit --config "$1" --config configs/trainer/ddp.yaml --trainer.accelerator "$2" \
            --trainer.num_nodes "$GROUP_WORLD_SIZE" --trainer.devices "$LOCAL_WORLD_SIZE" --resume auto "${@:3}"
    ' "$PYTHON" "$recipe" "$ACCELERATOR" "$@"
