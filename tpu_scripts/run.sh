#!/usr/bin/env bash
# run.sh [--dry-run] [--no-wait] MODULE ARG...: runs `python -m MODULE ARG...` on all workers.
#
# Arguments arrive as they are given, spaces, quotes and newlines too; `--out $OUT` is added where OUT is set. The
# command is detached: it outlives the connection and this script. The same arguments are the same run: called again,
# this attaches to it while it goes on, reports it when it has finished on all workers, and else starts it on all again.
# When one worker fails, the others are stopped and the ends of their logs shown.
#
# Exit codes: the command's own; 2 also for bad settings; 69 another command goes on there, and this one was not started;
# 137 where it ended without leaving a code; 255 workers cannot be reached, or there is no machine (any more); 129, 130, 131,
# 143 this script was interrupted (the command goes on).
set -euo pipefail
# shellcheck source=lib.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"

wait=1
while [[ ${1-} == -* ]]; do
  case $1 in
    --dry-run) dry_run=1 ;;
    --no-wait) wait= ;;
    --help) usage && exit ;;
    *) bad_option "$1" ;;
  esac
  shift
done
require_settings PROJECT ZONE TPU_NAME
check_command "$@"
arguments=(-u -m "$@")
if [[ ${OUT-} ]]; then arguments+=(--out "$OUT"); fi
name=run-$(quote "${arguments[@]}" | cksum | cut -d ' ' -f 1)

# shellcheck disable=SC2329 # The traps call it.
left_alone() {
  if [[ ${2-} ]]; then
    say "interrupted; $name goes on on $TPU_NAME (call this again to attach, delete.sh to end it and the payment)"
  fi
  return "$1"
}
at_end left_alone

# statuses ANSWER: what the workers say, a line each. A banner may stand before it.
statuses() { printf '%s\n' "$1" | sed -n 's/^.*ckl-status //p'; }

# count_workers: sets `workers`. Ends with 255 where gcloud does not say how many there are.
count_workers() {
  local answer number=$'(^|\n)([1-9][0-9]*)\r?($|\n)'
  answer=$(cloud tpu-vm describe '--format=value(networkEndpoints.len())' 2>&1) || true
  if [[ $dry_run ]]; then return; fi
  if [[ ! $answer =~ $number ]]; then fail 255 "gcloud does not say how many workers there are: ${answer##*$'\n'}"; fi
  workers=${BASH_REMATCH[2]}
}

# all_said ANSWER: no worker is silent. gcloud may end with 0 where one is.
all_said() { [[ $dry_run ]] || (($(statuses "$1" | grep -cE '^(running|exit|gone)') >= workers)); }

# worst_code ANSWER: "running", 0 when all workers are through, else a code, rather of a failure than of a worker that
# aborted since it lost another.
worst_code() {
  local what code worst=0 running=
  while read -r what code; do
    case $what in
      running) running=1 ;;
      exit | gone)
        if [[ ! $code =~ ^[0-9]+$ ]]; then code=137; fi # A host that crashed may leave an empty file.
        if ((code)) && { ((!worst)) || is_interruption "$worst"; }; then worst=$code; fi
        ;;
    esac
  done < <(statuses "$1")
  if ((!worst)) && [[ $running ]]; then echo running; else echo "$worst"; fi
}

# ask VERB ARG...: the workers' answer. Ends with 255 where one of them cannot be reached.
ask() {
  local code=0
  answer=$(on_workers all bash remote.sh "$1" "$name" "${@:2}" 2>&1) || code=$?
  if ((code == 127)) && [[ $answer == *remote.sh* ]]; then fail 2 "nothing is installed on $TPU_NAME: run setup.sh first"; fi
  if ((code)); then fail 255 "no $1 of $name on every worker: ${answer##*$'\n'}"; fi
}

workers=1
count_workers
if ((workers > 1)); then check_hosts "$1"; fi

# Workers start together: one that was through would not come back for the others, and one that went on without them would wait
# in vain.
ask status
if ! all_said "$answer"; then fail 255 "not all of $workers workers say how $name stands"; fi
code=$(worst_code "$answer")
if [[ $dry_run || $code != running && $code != 0 ]]; then
  if [[ $answer =~ ckl-status\ busy\ ([^[:space:]]+) ]]; then
    fail 69 "${BASH_REMATCH[1]}, with other arguments, goes on on $TPU_NAME: not started beside it (logs.sh shows it)"
  fi
  if [[ $answer == *"ckl-status running"* ]]; then ask stop; fi
  ask start "$(date +%s)-$$" "${arguments[@]}"
  code=running
fi
say "$name on $TPU_NAME: $(quote python "${arguments[@]}")"
if [[ ! $wait ]]; then exit 0; fi

unreachable=0
while [[ $code == running ]]; do
  pause "$POLL_SECONDS"
  if answer=$(on_workers all bash remote.sh status "$name" 2>&1) && all_said "$answer"; then
    unreachable=0
    code=$(worst_code "$answer")
  else
    unreachable=$((unreachable + 1))
    state=$(state_of ACTIVE)
    say "no connection ($state): ${answer##*$'\n'}"
    if is_dead "$state" || ((unreachable == 3)); then exit 255; fi
  fi
done
if ((code)); then
  say "$name ended with $code"
  show "$(on_workers all bash remote.sh stop "$name" 2>&1)"
  show "$(on_workers all bash remote.sh log "$name" 30 2>&1)"
else
  say "$name is finished"
fi
exit "$code"
