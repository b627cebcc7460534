#!/usr/bin/env bash
# delete.sh [--dry-run]: deletes the TPU and its queued resource, and looks whether both are gone.
#
# Exit codes: 0 there is none (any more); 2 bad settings; 7 it is still there, or gcloud does not say, and it may be paid
# for; 129, 130, 131, 143 interrupted: the same.
set -euo pipefail
# shellcheck source=lib.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"

while (($#)); do
  case $1 in
    --dry-run) dry_run=1 ;;
    --help) usage && exit ;;
    *) bad_option "$1" ;;
  esac
  shift
done
require_settings PROJECT ZONE TPU_NAME

# shellcheck disable=SC2329 # The traps call it.
warn() {
  if [[ ${2-} ]]; then say "interrupted; $TPU_NAME may still be there, and be paid for"; fi
  return "$1"
}
at_end warn

# delete GROUP FLAG...: what gcloud prints is held back: it must find somebody who reads it.
delete() {
  local answer
  if answer=$(long cloud "$1" delete "${@:2}" 2>&1); then
    say "deleted $TPU_NAME"
  elif ! is_gone "$answer"; then
    say "could not delete $1 $TPU_NAME: ${answer##*$'\n'}"
  fi
}

state=$(state_of ACTIVE) tries=0
while [[ $state != ABSENT ]]; do
  delete queued-resources --force
  state=$(state_of ABSENT)
  if [[ $state != ABSENT ]]; then
    delete tpu-vm # Made without a request, or left by it.
    state=$(state_of ABSENT)
  fi
  if [[ $state == ABSENT ]]; then break; fi
  if [[ ! $state =~ ^(DELETING|SUSPENDING)$ ]] || ((SECONDS >= MAX_DELETE_SECONDS)); then tries=$((tries + 1)); fi
  if ((tries == 5)); then
    fail 7 "$TPU_NAME IS STILL THERE ($state) AND MAY BE PAID FOR: run delete.sh again, or delete it in the console"
  fi
  pause "$POLL_SECONDS"
done
say "there is no $TPU_NAME in $ZONE of $PROJECT; nothing is paid for"
