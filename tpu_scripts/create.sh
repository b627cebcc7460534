#!/usr/bin/env bash
# create.sh [--dry-run] [--keep] [--new]: asks for the TPU by a queued resource and waits until it is ready.
#
# A request that exists already is waited for; with --new it is somebody else's, and refused. If this call is interrupted,
# or the request fails, it deletes what it asked for; --keep leaves it.
#
# Exit codes: 0 ready (and paid for until delete.sh); 2 bad settings, a checkout that setup.sh could not copy, or somebody
# else made it meanwhile (or gcloud, which repeated the request: it stays, AND WILL BE PAID FOR); 3 no machine; 4 the
# request was refused, for what it asks or who asks; 5 no machine within MAX_WAIT_SECONDS; 7 the request could not be
# deleted; 129, 130, 131, 143 interrupted.
set -euo pipefail
# shellcheck source=lib.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"

keep='' new=''
while (($#)); do
  case $1 in
    --dry-run) dry_run=1 ;;
    --keep) keep=1 ;;
    --new) new=1 ;;
    --help) usage && exit ;;
    *) bad_option "$1" ;;
  esac
  shift
done
require_settings PROJECT ZONE TPU_NAME ACCELERATOR_TYPE

preflight

asked='' ready=''
clean_up() {
  if [[ $asked && ! $ready && ! $keep ]]; then
    say "deleting the request for $TPU_NAME that this call made"
    "$here/delete.sh" || return 7
  fi
  return "$1"
}
at_end clean_up

# Once begun, the request is carried through, so that a signal cannot leave one that nobody knows of.
request() (
  trap '' HUP INT QUIT TERM
  flags=("--node-id=$TPU_NAME" "--accelerator-type=$ACCELERATOR_TYPE" "--runtime-version=$RUNTIME_VERSION")
  if ((SPOT)); then flags+=(--spot); fi
  long cloud queued-resources create "${flags[@]}" 2>&1
)

refusal='PERMISSION_DENIED|RESOURCE_EXHAUSTED|INVALID_ARGUMENT|FAILED_PRECONDITION'
state=$(state_of ABSENT)
case $state in
  ABSENT)
    asked=1
    if ! answer=$(request); then
      if [[ $answer == *ALREADY_EXISTS* || $answer == *"already exists"* ]]; then
        asked=
        fail 2 "$TPU_NAME was made meanwhile, by somebody else or by a request that gcloud repeated: look whose it is"
      fi
      if [[ $answer =~ $refusal ]]; then fail 4 "gcloud refused: $answer"; fi
      fail 3 "gcloud made no request: $answer"
    fi
    ;;
  UNKNOWN) fail 3 "no answer from gcloud about $TPU_NAME" ;;
  *)
    if [[ $new ]]; then fail 2 "$TPU_NAME was made by somebody else meanwhile, and is $state"; fi
    say "$TPU_NAME exists: $state"
    ;;
esac

seen='' unknown=0
until state=$(state_of ACTIVE) && [[ $state == ACTIVE ]]; do
  if [[ $state != "$seen" ]]; then say "$TPU_NAME: $state"; fi
  seen=$state
  if [[ $state == UNKNOWN ]]; then unknown=$((unknown + 1)); else unknown=0; fi
  if ((unknown == 10)); then fail 3 "no answer from gcloud about $TPU_NAME, ten times in turn; is it logged in?"; fi
  if is_dead "$state"; then fail 3 "$TPU_NAME is $state; no machine"; fi
  if ((SECONDS >= MAX_WAIT_SECONDS)) && [[ $state != UNKNOWN ]]; then
    fail 5 "no machine within MAX_WAIT_SECONDS=$MAX_WAIT_SECONDS ($state)"
  fi
  pause "$POLL_SECONDS"
done
ready=1
say "$TPU_NAME is ready, and paid for until delete.sh"
