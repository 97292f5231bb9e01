#!/usr/bin/env bash
# Training on the NVIDIA GPUs of one host: one process drives them all.
#
# usage: launch/gpu.sh install [--cuda 12|13]
#        launch/gpu.sh run [--gpus 0,1,...] -- TRAINING ARGUMENTS
#
#   install    this clone, with jax for GPUs, into the active Python environment
#   run        exit status as of launch/train.sh
#
#   --cuda N   of the wheels; they bring their own CUDA and need only the driver (12)
#   --gpus L   uses these GPUs alone
#   --dry-run  prints the commands, runs none

set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/commands.sh
source "$here/commands.sh"

command=${1-}
case $command in
  install)
    parse cuda "" "${@:2}"
    cuda=${given[cuda]-12}
    [[ $cuda == 12 || $cuda == 13 ]] || fail "--cuda is 12 or 13, got $cuda"
    ((${#training[@]} == 0)) || fail "install takes nothing behind --"
    run "${PYTHON:-python}" -m pip install "$(dirname "$here")" "jax[cuda$cuda]"
    ;;
  run)
    parse gpus "" "${@:2}"
    require_training_alone
    variables=(
      # jax takes 75 % by default; the rest is for cuDNN, NCCL and the driver
      XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.9}"
      XLA_FLAGS="--xla_gpu_enable_latency_hiding_scheduler=true${XLA_FLAGS:+ $XLA_FLAGS}"
    )
    if [[ -n ${given[gpus]-} ]]; then
      [[ ${given[gpus]} =~ ^[0-9]+(,[0-9]+)*$ ]] ||
        fail "--gpus wants numbers with commas between them, got ${given[gpus]}"
      variables+=(CUDA_VISIBLE_DEVICES="${given[gpus]}")
    fi
    become env "${variables[@]}" bash "$here/train.sh" -- "${training[@]}"
    ;;
  --help) usage ;;
  *) fail "install or run is wanted first, got '$command'; see --help" ;;
esac
