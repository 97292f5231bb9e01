#!/usr/bin/env bash
# One process of a training run, with an exit status that says what to do next:
#   0    finished: results.json is in the output directory
#   75   stopped by SIGTERM or SIGINT, and saved what there was: the same command goes on from there
#   else the status of an error, which the training has printed
# python -m laser_jax.train itself ends with 0 in the first two cases.
#
# usage: launch/train.sh [--dry-run] -- TRAINING ARGUMENTS
#
# PYTHON names the interpreter (python), RESULTS_WAIT the seconds (60) that a shared file system
# may take to show a file that process 0 wrote.

set -euo pipefail
# shellcheck source=launch/commands.sh
source "$(dirname "${BASH_SOURCE[0]}")/commands.sh"

parse "" "" "$@"
require_training
command=("${PYTHON:-python}" -m laser_jax.train "${training[@]}")
quoted "${command[@]}"
if $dry_run; then exit 0; fi

# A session of its own, since Slurm and terminals signal whole process groups: the training shall
# get each signal once.
process=
signalled=
pass_on() {
  signalled=$1
  if [[ -n $process ]]; then kill "-$1" "$process" 2>/dev/null || true; fi
}
trap 'pass_on TERM' TERM
trap 'pass_on INT' INT
setsid "${command[@]}" &
process=$!
if [[ -n $signalled ]]; then pass_on "$signalled"; fi
while true; do
  signalled=
  status=0
  wait "$process" || status=$?
  # a trapped signal ends `wait` early
  [[ -n $signalled ]] || break
done
results=$(training_output)/results.json
# killed by SIGINT or SIGTERM itself, before Python could heed them: nothing is under way
if ((status == 130 || status == 143)); then
  status=0
  RESULTS_WAIT=0
fi
((status == 0)) || exit "$status"

for ((waited = 0; ; waited++)); do
  if [[ -e $results ]]; then exit 0; fi
  ((waited < ${RESULTS_WAIT:-60})) || break
  sleep 1
done
echo "$results is not there: the training was stopped; the same command goes on"
exit 75
