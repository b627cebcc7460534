#!/usr/bin/env bash
# supervise.sh [--dry-run] [--keep] [--adopt] [--no-preflight] MODULE ARG...: create, setup, run, and again until it is done.
#
# After a preemption the machine is deleted and made again, and the command goes on from the same OUT, with the files of this
# checkout as they were at the start. When this script ends, for whatever reason (ctrl-C too), it deletes the machine; --keep
# leaves it. A machine that is there already is taken, and deleted at the end, with --adopt only, and left if another command goes
# on there (code 2). Where the extra `preflight` is installed, ckl_jax.pretrain and .finetune are compiled here first for that
# TPU, and refused if they do not fit its memory or cannot be compiled.
#
# Exit codes: 0 the command finished; 2 settings, arguments or a checkout that cannot work, or what was kept of it in
# ~/.cache was deleted, or preflight refused or failed (also where the command says so by its code 2 the first time that it
# ends: later 2 is a failure), or somebody else (or gcloud, which repeated a request) made the machine meanwhile: THEN IT
# STAYS, AND WILL BE PAID FOR; 3 the first request for a machine was refused; 4 setup or the command failed MAX_FAILURES
# times and saved nothing (three aborts count as a failure); 5 preempted, lost, refused or failed more than MAX_RETRIES
# times, or no machine within MAX_WAIT_SECONDS; 6 a loss or parameter of the command was not finite (its code 3); 7 THE
# MACHINE COULD NOT BE DELETED; 129, 130, 131, 143 interrupted.
set -euo pipefail
# shellcheck source=lib.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"

keep='' adopt='' compile=1 passed=()
while [[ ${1-} == -* ]]; do
  case $1 in
    --dry-run) dry_run=1 passed=(--dry-run) ;;
    --keep) keep=1 ;;
    --adopt) adopt=1 ;;
    --no-preflight) compile='' ;;
    --help) usage && exit ;;
    *) bad_option "$1" ;;
  esac
  shift
done
require_settings PROJECT ZONE TPU_NAME ACCELERATOR_TYPE OUT
check_command "$@"
if ! has_one_worker; then check_hosts "$1"; fi
check_arguments "$@"
preflight

# script NAME ARG...: one of this directory.
script() { step "$scripts/$1" ${passed[@]+"${passed[@]}"} "${@:2}"; }

ours='' frozen='' scripts=$here

# delete_at_last: nobody tries after this, so it bears an outage.
delete_at_last() {
  local end=$((SECONDS + MAX_DELETE_SECONDS))
  until script delete.sh; do
    if ((SECONDS >= end)); then return 7; fi
    say "trying to delete it for $((end - SECONDS)) s more (kill -9 $$ ends that)"
    pause "$RETRY_SECONDS"
  done
}

clean_up() {
  local code=$1 state
  if [[ ! -x $scripts/delete.sh ]]; then scripts=$here; fi
  if [[ $ours && $keep ]]; then
    state=$(state_of ACTIVE)
    if is_dead "$state"; then
      say "$TPU_NAME is $state: there is nothing to keep"
    else
      say "$TPU_NAME is kept ($state), and paid for until delete.sh"
    fi
  elif [[ $ours ]]; then
    say "deleting $TPU_NAME (--keep would leave it)"
    delete_at_last || code=7
  fi
  if [[ $frozen ]]; then rm -rf "$frozen"; fi
  return "$code"
}
at_end clean_up

# freeze: keeps these scripts and the packed checkout as they are now, for all machines of a job of days. Not in /tmp: many
# systems delete there what nobody read for days.
freeze() {
  local cache=${XDG_CACHE_HOME:-${HOME-}/.cache}/ckl_jax
  mkdir -p "$cache" && frozen=$(mktemp -d "$cache/supervise.XXXXXX") || return
  pack "$frozen" && cp -R "$here" "$frozen/scripts" || return
  scripts=$frozen/scripts
  export CKL_PACKED=$frozen/ckl_jax.tar.gz
}

if [[ ! $dry_run ]] && ! freeze; then fail 2 "the files of this checkout cannot be kept for the job"; fi
state=$(state_of ABSENT)
if [[ $state == UNKNOWN ]]; then fail 5 "no answer from gcloud; is it logged in?"; fi
if [[ $state =~ ^(SUSPEND|FAILED|DELETING|PREEMPTED|TERMINATED) ]]; then
  script delete.sh || exit
elif [[ $state != ABSENT && $adopt ]]; then
  say "taking $TPU_NAME, which is $state"
  ours=adopted
elif [[ $state != ABSENT ]]; then
  fail 2 "$TPU_NAME is $state already: --adopt takes it (and deletes it at the end), delete.sh deletes it"
fi
if [[ $compile && ! $ours ]]; then check_fits "$@"; fi

# has_saved: whether OUT has more than at the last look: every checkpoint gets a manifest, and an experiment results.json. What
# gcloud does not show has not been saved.
has_saved() {
  local names
  names=$(call gcloud storage ls --recursive "$OUT" 2>/dev/null | grep -E '(\.sha256|/results)\.json$') || return
  [[ $names != "$saved" ]] || return
  saved=$names
}

retries=0 failures=0 aborts=0 in_place=0 ready='' made='' accepted='' saved=''
while true; do
  if [[ $frozen && ! (-x $scripts/create.sh && -e $CKL_PACKED) ]]; then
    fail 2 "$frozen was deleted meanwhile; the same command goes on from $OUT, with the checkout as it is then"
  fi
  code=0 at=create new=()
  if [[ ! $ours ]]; then new=(--new) ours=1; fi
  script create.sh --keep ${new[@]+"${new[@]}"} || code=$?
  if ((code == 2)) && [[ ${new[*]-} ]]; then ours=; fi
  if ((!code)); then made=1; fi
  if ((!code)) && [[ ! $ready ]]; then
    at=setup
    script setup.sh && ready=1 || code=$?
  fi
  if ((!code)); then
    at=run begun=$SECONDS
    script run.sh "$@" || code=$?
    lasted=$((SECONDS - begun))
    if ((lasted >= STEADY_SECONDS)); then in_place=0; fi
  fi
  if ((!code)); then exit 0; fi
  if ((code == 69)) && [[ $at == run ]]; then
    if [[ $ours != adopted ]]; then fail 2 "another command was started on $TPU_NAME meanwhile"; fi
    ours=''
    fail 2 "$TPU_NAME is left to the command that goes on there, and paid for until delete.sh"
  fi
  if [[ $at == run ]] && ((code != 2)); then accepted=1; fi # A 2 from now on may be a bucket that does not answer.
  if ((code == 2)) && [[ $at != run || ! $accepted ]]; then fail 2 "$at ended with 2, for the reason above; not tried again"; fi
  if ((code == 4)) && [[ $at == create && ! $made ]]; then fail 3 "the request was refused; not tried again"; fi
  if ((code == 5)) && [[ $at == create ]]; then exit 5; fi # Asking again would begin at the end of the queue.
  if ((code == 3)) && [[ $at == run ]]; then fail 6 "a loss or parameter was not finite; it would be again: not tried"; fi

  if ((code != 255)); then ready=''; fi # The command has ended, and begins again with this checkout on all workers.
  silent=''
  while state=$(state_of ABSENT) && [[ $state == UNKNOWN ]]; do # The network here is down, say, and the command goes on.
    silent=1
    say "no answer from gcloud about $TPU_NAME, which may be paid for: looking again"
    pause "$RETRY_SECONDS"
  done
  # A silence may itself have ended create.sh, setup.sh or the connection; a command's own code came from the workers.
  if [[ $silent ]] && ! is_dead "$state" && { [[ $at != run ]] || ((code == 255)); }; then continue; fi
  if [[ $at == run ]] && ((code != 255)) && has_saved && ((lasted >= STEADY_SECONDS)); then failures=0 aborts=0; fi
  retries=$((retries + 1)) worn=''
  # A lost host, or a command that aborts by itself, for ever? Three times on one machine are told from that by another one.
  if [[ $at == run && $state == ACTIVE ]] && is_abort "$code"; then aborts=$((aborts + 1)); fi
  if ((aborts == 3)); then worn=1 aborts=0; fi
  if [[ $state == ACTIVE ]] && { [[ $worn ]] || ! is_interruption "$code"; }; then
    failures=$((failures + 1))
    say "$at failed with $code, failure $failures of $MAX_FAILURES"
    if ((failures >= MAX_FAILURES)); then exit 4; fi
  else
    say "$at was interrupted ($code, $TPU_NAME is $state), retry $retries of $MAX_RETRIES"
  fi
  if ((retries > MAX_RETRIES)); then exit 5; fi
  # A machine that is there is tried again twice in place: its sshd may be slow, or a host have restarted.
  in_place=$((in_place + 1))
  if [[ $state != ACTIVE || $worn ]] || ((code == 255 && in_place > 2)); then
    ready=''
    if script delete.sh; then ours='' in_place=0; fi # Else the next turn looks, and deletes it again.
  fi
  pause "$RETRY_SECONDS"
done
