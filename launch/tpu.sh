#!/usr/bin/env bash
# Cloud TPU VMs and pod slices.
#
# usage: launch/tpu.sh COMMAND NAME --zone ZONE [OPTIONS] [-- TRAINING ARGUMENTS]
#
#   create       a slice of --type
#   install      the committed state of this clone, with jax for TPUs, on every worker
#   run          starts the training on every worker and follows it; exit status as of
#                launch/train.sh. The training goes on when the connection ends
#   logs         follows the training again
#   stop         SIGTERM to the training on every worker: it saves and ends
#   delete       the slice
#   spot         create --queued --spot, install and run; after a pre-emption all of it again with
#                the same training command. A finished training's slice is deleted, a failed one's
#                is kept
#
#   --zone Z     of Google Cloud
#   --project P  instead of gcloud's own
#   --type T     create, spot: v4-16, v5litepod-16, v5p-8, v6e-8, ...
#   --version V  create, spot: software version, by default that of the generation
#   --queued     create, delete: through a queued resource of the slice's name
#   --spot       create: capacity that may be taken away
#   --bucket B   install, spot: mounts the Cloud Storage bucket at /bucket on every worker
#   --worker N   logs: follows this worker instead of 0
#   --dry-run    prints the commands, runs none
#
# POLL_SECONDS (60) lie between two looks at the state of a slice.

set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/commands.sh
source "$here/commands.sh"

declare -A values=([create]="type version" [install]=bucket [run]="" [logs]=worker [stop]=""
  [delete]="" [spot]="type version bucket")
declare -A flags=([create]="queued spot" [delete]=queued)

command=${1-}
if [[ $command == --help ]]; then
  usage
  exit 0
fi
[[ -n $command && -n ${values[$command]+known} ]] ||
  fail "create, install, run, logs, stop, delete or spot is wanted first, got '$command'; see --help"
name=${2-}
if [[ $name == --help ]]; then
  usage
  exit 0
fi
[[ $name =~ ^[a-z]([a-z0-9-]*[a-z0-9])?$ ]] ||
  fail "the slice's name is wanted after $command: small letters, digits and -, got '$name'"
parse "zone project ${values[$command]}" "${flags[$command]-}" "${@:3}"
require zone
where=(--zone="${given[zone]}" ${given[project]:+"--project=${given[project]}"})

vm() { run gcloud compute tpus tpu-vm "$1" "$name" "${where[@]}" "${@:2}"; }
queue() { run gcloud compute tpus queued-resources "$1" "$name" "${where[@]}" "${@:2}"; }
# on WORKER WORD ...: the command of tpu_worker.sh, there
on() {
  vm ssh --quiet --worker="$1" --command="$(quoted bash laser_jax/launch/tpu_worker.sh "${@:2}")"
}

software_version() {
  case ${given[type]} in
    v2-* | v3-* | v4-*) echo tpu-ubuntu2204-base ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    *) fail "the software version of ${given[type]} is not known here: give --version" ;;
  esac
}

# Whether the queued resource became ACTIVE; not, where its capacity was taken away again.
active() {
  local state
  if $dry_run; then
    queue describe --format='value(state.state)'
    echo "# ... again every ${POLL_SECONDS:-60} s until it prints ACTIVE"
    return
  fi
  while true; do
    state=$(gcloud compute tpus queued-resources describe "$name" "${where[@]}" \
      --format='value(state.state)')
    echo "$name: $state"
    case $state in
      ACTIVE) return 0 ;;
      SUSPENDING | SUSPENDED) return 1 ;;
      FAILED | DELETING) fail "the queued resource $name is $state; gcloud ... describe says why" ;;
    esac
    sleep "${POLL_SECONDS:-60}"
  done
}

ready() {
  local state
  state=$(gcloud compute tpus tpu-vm describe "$name" "${where[@]}" --format='value(state)') ||
    state=gone
  echo "$name: $state"
  [[ $state == READY ]]
}

install_package() {
  local archive=${TMPDIR:-/tmp}/laser_jax-$name.tar.gz
  run git -C "$(dirname "$here")" archive --format=tar.gz --prefix=laser_jax/ --output="$archive" HEAD &&
    run gcloud compute tpus tpu-vm scp "$archive" "$name:laser_jax.tar.gz" "${where[@]}" \
      --quiet --worker=all &&
    vm ssh --quiet --worker=all --command="tar xzf laser_jax.tar.gz" &&
    on all install ${given[bucket]:+--bucket "${given[bucket]}"}
}

start_training() { on all start -- "${training[@]}" --distributed true; }

# patiently WORD ...: again, as long as the connection is lost and the slice is there. 255 is ssh's
# own: a lost connection, or a lost slice.
patiently() {
  local status
  while true; do
    status=0
    "$@" || status=$?
    if ((status != 255)) || ! ready; then return "$status"; fi
    sleep "${POLL_SECONDS:-60}"
  done
}

until_finished() {
  local status
  while true; do
    queue create --node-id="$name" --accelerator-type="${given[type]}" \
      --runtime-version="$version" --spot
    status=0
    { active && patiently install_package && patiently start_training &&
      patiently on 0 follow; } || status=$?
    # SIGTERM comes before the state changes; 143 where launch/train.sh could not heed it yet
    if ((status == 75 || status == 143)) && ! $dry_run; then sleep "${POLL_SECONDS:-60}"; fi
    if ((status != 0)) && ready; then
      fail "status $status on a slice that is there: no pre-emption, but an error or tpu.sh stop.
It is kept, and goes on costing; see tpu.sh logs $name, and tpu.sh delete $name --queued"
    fi
    queue delete --force --quiet
    if ((status == 0)); then break; fi
    echo "$name was taken away; the same training goes on on another"
  done
  if $dry_run; then echo "# ... all of it again as long as the slice is taken away"; fi
}

case $command in
  create)
    require type
    version=${given[version]-$(software_version)}
    spot=(${given[spot]:+--spot})
    if [[ -n ${given[queued]-} ]]; then
      queue create --node-id="$name" --accelerator-type="${given[type]}" \
        --runtime-version="$version" "${spot[@]}"
      active || fail "the slice was taken away while it was made; delete it and create it again"
    else
      vm create --accelerator-type="${given[type]}" --version="$version" "${spot[@]}"
    fi
    ;;
  install) install_package ;;
  run)
    require_training_alone
    start_training
    on 0 follow
    ;;
  logs)
    worker=${given[worker]-0}
    [[ $worker =~ ^[0-9]+$ ]] || fail "--worker wants the number of a worker, got $worker"
    on "$worker" follow
    ;;
  stop) on all stop ;;
  delete)
    if [[ -n ${given[queued]-} ]]; then queue delete --force --quiet; else vm delete --quiet; fi
    ;;
  spot)
    require type bucket
    require_training_alone
    [[ $(training_output) == /bucket/* ]] ||
      fail "--output $(training_output) would go with the slice: name a directory under /bucket"
    version=${given[version]-$(software_version)}
    until_finished
    ;;
esac
