# shellcheck shell=bash
# What the scripts of this directory share; sourced, not run.
set -euo pipefail
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=env.sh
source "$here/env.sh"

dry_run=
exec 3>&1 # Where a dry run prints its commands, also from within $(...).

say() { printf '%s: %s\n' "${0##*/}${dry_run:+ (dry run)}" "$*" >&2; }

# fail CODE MESSAGE...
fail() {
  say "${@:2}"
  exit "$1"
}

# The comment at the top of a script, as its --help.
usage() { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; }

# bad_option OPTION
bad_option() { fail 2 "$1 is no option of this script; see --help"; }

# quote WORD...: one line of shell, in POSIX quoting since the other side's login shell need not be bash.
quote() {
  local word line='' one="'"
  for word in "$@"; do
    if [[ ! $word =~ ^[A-Za-z0-9_./:=@%+,-]+$ ]]; then word="'${word//$one/$one\\$one$one}'"; fi
    line+="${line:+ }$word"
  done
  printf '%s' "$line"
}

# call COMMAND...: runs it, or prints it in a dry run. Nothing reads the terminal: gcloud's ssh would eat it.
call() {
  if [[ $dry_run ]]; then
    printf '%s\n' "$(quote "$@")" >&3
  else
    "$@" </dev/null
  fi
}

# queued VERB FLAG...: gcloud on the queued resource.
queued() {
  call gcloud compute tpus queued-resources "$1" "$TPU_NAME" "--project=$PROJECT" "--zone=$ZONE" --quiet "${@:2}"
}

# on_workers WORKERS COMMAND...: ssh. gcloud repeats the command when the connection breaks: it must bear that.
on_workers() {
  call gcloud compute tpus tpu-vm ssh "$TPU_NAME" "--project=$PROJECT" "--zone=$ZONE" --quiet "--worker=$1" \
    --ssh-flag=-oServerAliveInterval=30 --ssh-flag=-oConnectTimeout=30 "--command=$(quote "${@:2}")"
}

# state_of ASSUMED: the queued resource's state, ABSENT, or UNKNOWN where gcloud gives no answer. ASSUMED: of a dry run.
state_of() {
  local answer
  if [[ $dry_run ]]; then
    queued describe '--format=value(state.state)'
    echo "$1"
  elif answer=$(queued describe '--format=value(state.state)' 2>&1); then
    grep -Ex '[A-Z_]+' <<<"$answer" | tail -n 1 || echo UNKNOWN
  elif [[ $answer == *NOT_FOUND* || $answer == *"was not found"* ]]; then
    echo ABSENT
  else
    say "${answer##*$'\n'}"
    echo UNKNOWN
  fi
}

# is_dead STATE: no machine is left and none will come; nothing is paid for.
is_dead() { [[ $1 == SUSPENDING || $1 == SUSPENDED || $1 == FAILED || $1 == DELETING || $1 == ABSENT ]]; }

# is_interruption CODE: the command did not fail by itself. 134: JAX aborts when a peer host is lost; 137 and 143:
# SIGKILL and SIGTERM; 75 (EX_TEMPFAIL): saved and stopped on request; 255: the connection was lost.
is_interruption() { [[ $1 == 134 || $1 == 137 || $1 == 143 || $1 == 75 || $1 == 255 ]]; }

pause() { call sleep "$1"; }
