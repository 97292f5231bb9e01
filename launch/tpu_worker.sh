#!/usr/bin/env bash
# What launch/tpu.sh runs on every worker of a slice.
#
# usage: tpu_worker.sh install [--bucket B]
#        tpu_worker.sh start -- TRAINING ARGUMENTS
#        tpu_worker.sh follow
#        tpu_worker.sh stop
#
#   install     this clone, with jax for TPUs, into ~/laser_env; mounts the bucket at /bucket
#   start       the training, which goes on when the connection ends; log and status in ~/laser_run.
#               Where the same one trains already it is left alone
#   follow      prints the log until the training ends, and ends with its status (launch/train.sh)
#   stop        SIGTERM to the training
#
#   --dry-run   prints the commands, runs none

set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/commands.sh
source "$here/commands.sh"

environment=$HOME/laser_env
state=$HOME/laser_run

install_package() {
  # The images of Cloud TPU have Python 3.10, which is too old; uv brings its own.
  run python3 -m pip install --quiet --user uv
  run "$HOME/.local/bin/uv" venv --quiet --allow-existing --python 3.12 "$environment"
  run "$HOME/.local/bin/uv" pip install --quiet --python "$environment/bin/python" \
    "$(dirname "$here")" "jax[tpu]"
}

mount_bucket() {
  local release repository="deb [signed-by=/usr/share/keyrings/cloud.google.asc]"
  release=$(sed -n 's/^VERSION_CODENAME=//p' /etc/os-release)
  repository+=" https://packages.cloud.google.com/apt gcsfuse-$release main"
  run bash -c "echo ${repository@Q} | sudo tee /etc/apt/sources.list.d/gcsfuse.list"
  run sudo curl -fsSL -o /usr/share/keyrings/cloud.google.asc \
    https://packages.cloud.google.com/apt/doc/apt-key.gpg
  run sudo apt-get -qq update
  run sudo apt-get -qq install -y gcsfuse
  run sudo mkdir -p /bucket
  run sudo chown "$(id -un)" /bucket
  if $dry_run || ! mountpoint -q /bucket; then
    # Without the caches of what exists, since other workers write there; directories of
    # checkpoints are renamed when they are whole.
    run gcsfuse --implicit-dirs --rename-dir-limit=100000 --metadata-cache-ttl-secs=0 \
      --metadata-cache-negative-ttl-secs=0 "${given[bucket]}" /bucket
  fi
}

running() {
  [[ -e $state/pid ]] && kill -0 "$(<"$state/pid")" 2>/dev/null
}

command=${1-}
case $command in
  install)
    parse bucket "" "${@:2}"
    install_package
    if [[ -n ${given[bucket]-} ]]; then mount_bucket; fi
    ;;
  start)
    parse "" "" "${@:2}"
    require_training
    if running; then
      [[ $(<"$state/arguments") == "${training[*]@Q}" ]] ||
        fail "process $(<"$state/pid") still trains something else here: stop it, or follow it"
      echo "process $(<"$state/pid") trains this already"
      exit 0
    fi
    if $dry_run; then
      quoted setsid bash "$here/tpu_worker.sh" supervise -- "${training[@]}"
      exit 0
    fi
    mkdir -p "$state"
    rm -f "$state/status" "$state/pid"
    echo "${training[*]@Q}" >"$state/arguments"
    setsid nohup bash "$here/tpu_worker.sh" supervise -- "${training[@]}" \
      >"$state/log" 2>&1 </dev/null &
    until [[ -s $state/pid ]]; do sleep 0.1; done
    ;;
  supervise)
    parse "" "" "${@:2}"
    cd "$here/.."
    PYTHON=${PYTHON:-$environment/bin/python} bash launch/train.sh -- "${training[@]}" &
    echo $! >"$state/pid"
    status=0
    wait "$!" || status=$?
    echo "$status" >"$state/status"
    ;;
  follow)
    parse "" "" "${@:2}"
    if $dry_run; then
      quoted tail -n +1 -F "$state/log"
      exit 0
    fi
    [[ -e $state/pid ]] || fail "no training was started on $(hostname)"
    tail -n +1 -F --pid="$(<"$state/pid")" "$state/log"
    for ((waited = 0; waited < 50; waited++)); do
      if [[ -s $state/status ]]; then exit "$(<"$state/status")"; fi
      sleep 0.1
    done
    echo "error: the training on $(hostname) ended without a status: it was killed" >&2
    exit 1
    ;;
  stop)
    parse "" "" "${@:2}"
    if $dry_run; then
      quoted kill -TERM PID
    elif running; then
      run kill -TERM "$(<"$state/pid")"
    else
      echo "nothing trains on $(hostname)"
    fi
    ;;
  --help) usage ;;
  *) fail "install, start, follow or stop is wanted first, got '$command'; see --help" ;;
esac
