#!/usr/bin/env bash
# TPU slices on Google Kubernetes Engine, through XPK (pip install xpk).
#
# usage: launch/gke.sh COMMAND --cluster C --zone Z --project P [OPTIONS] [-- TRAINING ARGUMENTS]
#
#   cluster      makes the cluster, with one slice of --type
#   storage      attaches the Cloud Storage bucket --bucket; runs see it at /bucket
#   image        builds and pushes the container --image from the committed state of this clone
#   run          submits the training as the workload --workload, restarted after pre-emptions
#   logs         follows the log of its first worker
#   delete       the workload, which is stopped: it saves first
#
#   --type T     cluster, run: v5litepod-16, v6e-8, v4-16, ...
#   --spot       cluster: capacity that may be taken away
#   --bucket B   storage, run
#   --image I    image, run: REGISTRY/NAME:TAG
#   --workload W run, logs, delete: its name
#   --restarts N run: at most (50)
#   --dry-run    prints the commands, runs none

set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/commands.sh
source "$here/commands.sh"

declare -A values=([cluster]=type [storage]=bucket [image]=image [logs]=workload [delete]=workload
  [run]="type bucket image workload restarts")

command=${1-}
if [[ $command == --help ]]; then
  usage
  exit 0
fi
[[ -n $command && -n ${values[$command]+known} ]] ||
  fail "cluster, storage, image, run, logs or delete is wanted first, got '$command'; see --help"
flags=""
if [[ $command == cluster ]]; then flags=spot; fi
parse "cluster zone project ${values[$command]}" "$flags" "${@:2}"
if [[ $command != image ]]; then require cluster zone project; fi
where=(--cluster="${given[cluster]-}" --zone="${given[zone]-}" --project="${given[project]-}")

case $command in
  cluster)
    require type
    capacity=--on-demand
    if [[ -n ${given[spot]-} ]]; then capacity=--spot; fi
    run xpk cluster create "${where[@]}" --tpu-type="${given[type]}" --num-slices=1 "$capacity" \
      --enable-gcsfuse-csi-driver
    ;;
  storage)
    require bucket
    run xpk storage attach "${given[bucket]}" "${where[@]}" --type=gcsfuse \
      --bucket="${given[bucket]}" --mount-point=/bucket --readonly=false --auto-mount=false \
      --size=1 --mount-options=implicit-dirs,rename-dir-limit=100000,metadata-cache-ttl-secs=0,metadata-cache-negative-ttl-secs=0
    ;;
  image)
    require image
    archive=$(quoted git -C "$(dirname "$here")" archive HEAD)
    build=$(quoted docker build --file launch/Dockerfile --tag "${given[image]}" -)
    run bash -c "set -o pipefail; $archive | $build"
    run docker push "${given[image]}"
    ;;
  run)
    require type bucket image workload
    given[restarts]=${given[restarts]-50}
    require_number restarts
    require_training_alone
    [[ $(training_output) == /bucket/* ]] ||
      fail "--output $(training_output) would go with the container: name a directory under /bucket"
    # exec, so that SIGTERM reaches it; 75 says that it stopped and wants to go on
    run xpk workload create "${where[@]}" --workload="${given[workload]}" \
      --tpu-type="${given[type]}" --num-slices=1 --docker-image="${given[image]}" \
      --storage="${given[bucket]}" --max-restarts="${given[restarts]}" --restart-on-exit-codes=75 \
      --termination-grace-period-seconds=180 \
      --command="exec $(quoted bash launch/train.sh -- "${training[@]}" --distributed true)"
    ;;
  logs)
    require workload
    run gcloud container clusters get-credentials "${given[cluster]}" \
      --location="${given[zone]%-*}" --project="${given[project]}"
    run kubectl logs --follow \
      --selector="jobset.sigs.k8s.io/jobset-name=${given[workload]},batch.kubernetes.io/job-completion-index=0"
    ;;
  delete)
    require workload
    run xpk workload delete "${where[@]}" --workload="${given[workload]}"
    ;;
esac
