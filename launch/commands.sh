# shellcheck shell=bash
# Sourced by the scripts beside it: their arguments, and commands that --dry-run prints and does not run.

dry_run=false
declare -A given=()
training=()

fail() {
  echo "error: $*" >&2
  exit 2
}

# The comment at the head of the script.
usage() {
  sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
}

# parse "OPTION ..." "FLAG ..." ARGUMENT ...
# Fills given[OPTION], given[FLAG]=true and, from what follows --, training.
parse() {
  local values=" $1 " flags=" $2 " option
  shift 2
  while (($#)); do
    option=${1#--}
    case $1 in
      --help)
        usage
        exit 0
        ;;
      --dry-run) dry_run=true ;;
      --)
        shift
        training=("$@")
        return
        ;;
      --*)
        if [[ $flags == *" $option "* ]]; then
          given[$option]=true
        elif [[ $values == *" $option "* ]]; then
          [[ $# -ge 2 && -n $2 && $2 != --* ]] || fail "$1 wants a value after it; see --help"
          given[$option]=$2
          shift
        else
          fail "unknown option $1; see --help"
        fi
        ;;
      *) fail "unexpected argument $1: the arguments of the training stand behind --; see --help" ;;
    esac
    shift
  done
}

require() {
  local option
  for option in "$@"; do
    [[ -n ${given[$option]-} ]] || fail "--$option is missing; see --help"
  done
}

require_number() {
  local option
  for option in "$@"; do
    [[ ${given[$option]} =~ ^[1-9][0-9]*$ ]] ||
      fail "--$option wants a whole number from 1, got ${given[$option]}"
  done
}

# The --output of the training, which is where a finished run leaves results.json.
training_output() {
  local word previous='' output=''
  for word in "${training[@]}"; do
    [[ $previous == --output ]] && output=$word
    [[ $word == --output=* ]] && output=${word#--output=}
    previous=$word
  done
  echo "$output"
}

require_training() {
  ((${#training[@]})) || fail "the arguments of the training are missing: give them behind --"
  [[ -n $(training_output) ]] ||
    fail "--output DIR is missing behind --: a run is resumed from its output directory"
}

# Where the script itself says how many processes there are.
require_training_alone() {
  local word
  require_training
  for word in "${training[@]}"; do
    case $word in
      --distributed*)
        fail "$word is set by this script; leave it out behind --"
        ;;
    esac
  done
}

# The words as one string that any shell reads back as the same words.
quoted() {
  local word line=() apostrophe="'\\''"
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]] || word="'${word//\'/$apostrophe}'"
    line+=("$word")
  done
  echo "${line[*]}"
}

run() {
  quoted "$@"
  $dry_run || "$@"
}

# As `run`, in place of this script, so that signals reach the command.
become() {
  quoted "$@"
  $dry_run || exec "$@"
}
