# shellcheck shell=bash
# What the scripts of this directory share; sourced, not run.
set -euo pipefail
trap '' PIPE XFSZ # Output that nobody reads, or that does not fit, must not end what deletes a machine.
: 3>&2 || exec 2>/dev/null
{ : 3>&1; } 2>/dev/null || exec >/dev/null
exec </dev/null # Nothing reads the terminal: gcloud's ssh would eat it.
exec 3>&1       # Where a dry run prints its commands, also from within $(...).
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=env.sh
source "$here/env.sh"
# shellcheck source=checks.sh
source "$here/checks.sh"

dry_run=
replace=   # Set in a step: the command takes the place of the shell that would wait for it.
unlimited= # Set: a call of gcloud may take as long as it likes.
if ! command -v timeout >/dev/null; then unlimited=1; fi

say() { printf '%s: %s\n' "${0##*/}${dry_run:+ (dry run)}" "$*" >&2 || true; }

# fail CODE MESSAGE...
fail() {
  say "${@:2}"
  exit "$1"
}

# show TEXT: what gcloud printed. It is held back till then: gcloud would end where nobody reads it any more.
show() { if [[ $1 ]]; then printf '%s\n' "$1" >&2 || true; fi; }

# The comment at the top of a script, as its --help.
usage() { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; }

# bad_option OPTION
bad_option() { fail 2 "$1 is no option of this script; see --help"; }

# at_end FUNCTION: FUNCTION CODE [SIGNAL] is called once, whatever ends the script, and returns the exit code. Further
# signals and failures do not end it.
at_end() {
  local signal
  # shellcheck disable=SC2064 # The name is wanted as it is now.
  trap "finish $1 \$?" EXIT
  for signal in 129:HUP 130:INT 131:QUIT 143:TERM; do
    # shellcheck disable=SC2064
    trap "finish $1 ${signal/:/ }" "${signal#*:}"
  done
}

finish() {
  trap '' HUP INT QUIT TERM
  trap - EXIT
  set +eu
  local job
  for job in $(jobs -p); do
    kill -TERM -- "-$job" 2>/dev/null
    wait "$job"
  done
  "$@"
  exit "$?"
}

# step COMMAND...: in a process group of its own, which a signal to this script ends, and at once.
step() {
  local code=0 replace=1
  set -m
  "$@" &
  set +m
  wait "$!" || code=$?
  return "$code"
}

pause() { if [[ $dry_run ]]; then call sleep "$1"; else step sleep "$1"; fi; }

# quote WORD...: one line of shell, in POSIX quoting since the other side's login shell need not be bash.
quote() {
  local word line='' one="'"
  for word in "$@"; do
    if [[ ! $word =~ ^[A-Za-z0-9_./:=@%+,-]+$ ]]; then word="'${word//$one/$one\\$one$one}'"; fi
    line+="${line:+ }$word"
  done
  printf '%s' "$line"
}

# bounded COMMAND...: within CALL_SECONDS. 124 or 137: it took longer.
bounded() {
  if [[ $unlimited ]]; then
    ${replace:+exec} "$@"
  else
    ${replace:+exec} timeout -k 10 "$CALL_SECONDS" "$@"
  fi
}

# call COMMAND...: the same, or prints it in a dry run.
call() {
  if [[ $dry_run ]]; then
    printf '%s\n' "$(quote "$@")" >&3
  else
    bounded "$@" 3>&-
  fi
}

# long COMMAND...: ten times that.
long() {
  local CALL_SECONDS=$((10 * CALL_SECONDS))
  "$@"
}

# cloud GROUP VERB FLAG...: gcloud on the queued resource or the machine, which have the same name.
cloud() {
  call gcloud compute tpus "$1" "$2" "$TPU_NAME" "--project=$PROJECT" "--zone=$ZONE" --quiet "${@:3}"
}

# One login name for all who start or adopt a job: a command that runs is looked for in its home directory.
worker_login=ckl@${TPU_NAME-}

# on_workers WORKERS COMMAND...: ssh. gcloud repeats the command when the connection breaks: it must bear that.
on_workers() {
  call gcloud compute tpus tpu-vm ssh "$worker_login" "--project=$PROJECT" "--zone=$ZONE" --quiet "--worker=$1" \
    --ssh-flag=-oBatchMode=yes --ssh-flag=-oServerAliveInterval=30 --ssh-flag=-oConnectTimeout=30 \
    "--command=$(quote "${@:2}")"
}

# is_gone ANSWER: gcloud says that there is no such machine or request. It says "was not found" of other things too: of a file
# with the login's token, for example.
is_gone() { [[ $1 == *NOT_FOUND*"/$TPU_NAME'"*"was not found"* ]]; }

# look GROUP FIELD: a state, ABSENT, or UNKNOWN where gcloud gives no answer.
look() {
  local answer one_word=$'(^|\n)([A-Z_]+)\r?($|\n)'
  if answer=$(cloud "$1" describe "--format=value($2)" 2>&1) && [[ $answer =~ $one_word ]]; then
    echo "${BASH_REMATCH[2]}"
  elif is_gone "$answer"; then
    echo ABSENT
  else
    say "no state of $1 $TPU_NAME: ${answer##*$'\n'}"
    echo UNKNOWN
  fi
}

# state_of ASSUMED: ACTIVE: the request is, and its machine ready. ABSENT: there is neither. UNKNOWN: gcloud gives no answer.
# Else what the request is waiting for or ended by, or, where it says ACTIVE or is gone, the machine's state: a request may
# stay ACTIVE when its machine was preempted. ASSUMED: of a dry run.
state_of() {
  local request machine
  if [[ $dry_run ]]; then
    cloud queued-resources describe '--format=value(state.state)'
    cloud tpu-vm describe '--format=value(state)'
    echo "$1"
    return
  fi
  request=$(look queued-resources state.state)
  if [[ $request == ACTIVE || $request == ABSENT ]]; then
    machine=$(look tpu-vm state)
    case $request/$machine in
      ACTIVE/READY | ACTIVE/UNKNOWN | ABSENT/READY) request=ACTIVE ;;
      ACTIVE/ABSENT) request=MACHINE_ABSENT ;;
      *) request=$machine ;;
    esac
  fi
  echo "$request"
}

# is_dead STATE: no machine is left and none will come.
is_dead() { [[ $1 =~ ^(SUSPEND(ING|ED)|FAILED|DELETING|(MACHINE_)?ABSENT|PREEMPTED|TERMINATED|STOP(PING|PED)|HID(ING|DEN))$ ]]; }

# is_out_of_reach CODE ANSWER: gcloud hung (124), lost the connection, or says that the machine itself cannot be used.
is_out_of_reach() {
  [[ $1 == 124 || $1 == 137 || $1 == 255 || $2 == *"terminal state"* || $2 == *"TPU has state"* ||
    $2 == *"currently in"*state* || $2 == *"maintenance event"* ]]
}

# is_interruption CODE: the command did not fail by itself. 134: JAX aborts when a peer host is lost; 137 and 143:
# SIGKILL and SIGTERM; 75 (EX_TEMPFAIL): saved and stopped on request; 255: the connection was lost.
is_interruption() { is_abort "$1" || [[ $1 == 75 || $1 == 255 ]]; }
is_abort() { [[ $1 == 134 || $1 == 137 || $1 == 143 ]]; }
