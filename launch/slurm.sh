#!/usr/bin/env bash
# Submits a training on the GPUs of one or more nodes to Slurm: one process a GPU.
#
# usage: launch/slurm.sh --nodes N --gpus-per-node N --time T [OPTIONS] -- TRAINING ARGUMENTS
#
#   --nodes N          nodes of the job
#   --gpus-per-node N  GPUs, and so processes, on each
#   --time T           limit of the job, [D-]HH:MM:SS; three minutes before it the training saves,
#                      and the job goes back into the queue until the training has finished
#   --cpus-per-gpu N   CPU cores of each process (8)
#   --partition P      of the cluster
#   --account A        of the cluster
#   --interface IF     network interface of NCCL's sockets, where its own choice is wrong
#   --dry-run          prints the commands, runs none
#
# The Python environment must be active, and like the clone and the output directory on a file
# system that all nodes see.

set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/commands.sh
source "$here/commands.sh"

parse "nodes gpus-per-node time cpus-per-gpu partition account interface" "" "$@"
require nodes gpus-per-node time
given[cpus-per-gpu]=${given[cpus-per-gpu]-8}
require_number nodes gpus-per-node cpus-per-gpu
[[ ${given[time]} =~ ^([0-9]+-)?[0-9]{1,2}:[0-9]{2}:[0-9]{2}$ ]] ||
  fail "--time wants [D-]HH:MM:SS, got ${given[time]}"
require_training_alone

run sbatch --nodes="${given[nodes]}" --gpus-per-node="${given[gpus-per-node]}" \
  --ntasks-per-node="${given[gpus-per-node]}" --cpus-per-task="${given[cpus-per-gpu]}" \
  --time="${given[time]}" ${given[partition]:+--partition="${given[partition]}"} \
  ${given[account]:+--account="${given[account]}"} --chdir="$(dirname "$here")" \
  "$here/slurm.sbatch" ${given[interface]:+--interface "${given[interface]}"} -- "${training[@]}"

if $dry_run; then
  echo "# in the job:"
  cd "$here/.."
  SLURM_CPUS_PER_TASK=${given[cpus-per-gpu]} bash launch/slurm.sbatch --dry-run \
    ${given[interface]:+--interface "${given[interface]}"} -- "${training[@]}"
fi
