#!/usr/bin/env bash
# The settings of all scripts here, by environment variables. Run by itself it checks and prints them.
#
#   PROJECT            Google Cloud project that pays
#   ZONE               for example us-west4-a
#   TPU_NAME           name of the machine and of its queued resource
#   ACCELERATOR_TYPE   for example v5litepod-16, v6e-8, v4-8
#   OUT                gs://bucket/directory of the run; every retry goes on from there
#   RUNTIME_VERSION    derived from ACCELERATOR_TYPE where it is unset
#   SPOT               1 (default): cheaper, may be preempted; 0: on demand
#   POLL_SECONDS       seconds between two looks at the machine or the command (30)
#   RETRY_SECONDS      pause before something is tried again (60)
#   CALL_SECONDS       when a call of gcloud counts as hung, if there is `timeout` (120; ten times that to create, delete,
#                      copy or install); 0: never
#   MAX_WAIT_SECONDS   how long to queue for a machine (86400)
#   MAX_DELETE_SECONDS how long delete.sh waits for a deletion that goes on, and supervise.sh tries again at its end (3600)
#   MAX_RETRIES        how many preemptions, lost machines, refused requests and failures supervise.sh outlives (20)
#   MAX_FAILURES       how many failures of setup or command end supervise.sh (2)
#   STEADY_SECONDS     when a command has run for so long, earlier lost connections are forgotten, and failures too if it has
#                      saved something (600); they still count for MAX_RETRIES
#
# Exit codes: 0 all set; 2 something is missing or wrong, all of it listed at once.
set -euo pipefail

SPOT=${SPOT-1}
POLL_SECONDS=${POLL_SECONDS-30}
RETRY_SECONDS=${RETRY_SECONDS-60}
CALL_SECONDS=${CALL_SECONDS-120}
MAX_WAIT_SECONDS=${MAX_WAIT_SECONDS-86400}
MAX_DELETE_SECONDS=${MAX_DELETE_SECONDS-3600}
MAX_RETRIES=${MAX_RETRIES-20}
MAX_FAILURES=${MAX_FAILURES-2}
STEADY_SECONDS=${STEADY_SECONDS-600}
if [[ -z ${RUNTIME_VERSION-} ]]; then
  case ${ACCELERATOR_TYPE-} in
    v[234]-[1-9]*) RUNTIME_VERSION=tpu-ubuntu2204-base ;;
    v5litepod-[1-9]*) RUNTIME_VERSION=v2-alpha-tpuv5-lite ;;
    v5p-[1-9]*) RUNTIME_VERSION=v2-alpha-tpuv5 ;;
    v6e-[1-9]*) RUNTIME_VERSION=v2-alpha-tpuv6e ;;
  esac
fi

# usual_types NAME: what gcloud calls the types that NAME may mean (v5e-8, v5lite_8, V6E, trillium-8, tpu-v4-8), or nothing.
usual_types() {
  local name cores form='^(cloud)?(tpu)?(v[2-6]|trillium)(e|p|x|i|lite|litepod|pod)?([0-9]*)$'
  name=$(printf '%s' "$1" | tr '[:upper:]' '[:lower:]' | tr -cd '[:alnum:]')
  if [[ ! $name =~ $form ]]; then return; fi
  cores=${BASH_REMATCH[5]:-8}
  case ${BASH_REMATCH[3]}${BASH_REMATCH[4]} in
    v5p) echo "v5p-$cores" ;;
    v5) echo "v5litepod-$cores or v5p-$cores" ;;
    v5*) echo "v5litepod-$cores" ;;
    v6* | trillium*) echo "v6e-$cores" ;;
    *) echo "${BASH_REMATCH[3]}-$cores" ;;
  esac
}

# require_settings NAME...: ends with code 2 and a line per setting that is missing or wrong.
require_settings() {
  local name types number='^[0-9]{1,9}([.][0-9]+)?$' whole='^(0|[1-9][0-9]{0,8})$' bad=()
  local bucket='^gs://[a-z0-9][-_.a-z0-9]*(/[^/[:space:][:cntrl:]]+)+/?$'
  for name in "$@"; do
    if [[ -z ${!name-} ]]; then bad+=("$name: missing"); fi
  done
  if [[ -n ${TPU_NAME-} && ! $TPU_NAME =~ ^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$ ]]; then
    bad+=("TPU_NAME: got $TPU_NAME; allowed are a-z, 0-9 and -, beginning with a letter, at most 63")
  fi
  if [[ -n ${OUT-} && ! $OUT =~ $bucket ]]; then
    bad+=("OUT: got $OUT; allowed is gs://bucket/directory, which outlives the machine")
  elif [[ ${OUT-} == *[][*?\\]* ]]; then
    bad+=("OUT: got $OUT; allowed is gs://bucket/directory without [ ] * ? \\, which Orbax takes for patterns")
  fi
  if [[ -n ${ACCELERATOR_TYPE-} && -z ${RUNTIME_VERSION-} ]]; then
    types=$(usual_types "$ACCELERATOR_TYPE")
    if [[ $types ]]; then
      bad+=("ACCELERATOR_TYPE: got $ACCELERATOR_TYPE, which gcloud calls $types")
    else
      bad+=("RUNTIME_VERSION: missing, and not known for ACCELERATOR_TYPE $ACCELERATOR_TYPE")
    fi
  fi
  if [[ $SPOT != [01] ]]; then bad+=("SPOT: got $SPOT; allowed are 0 and 1"); fi
  for name in POLL_SECONDS RETRY_SECONDS; do
    if [[ ! ${!name} =~ $number ]]; then bad+=("$name: got ${!name}; allowed are seconds, 0 or more"); fi
  done
  for name in CALL_SECONDS MAX_WAIT_SECONDS MAX_DELETE_SECONDS MAX_RETRIES MAX_FAILURES STEADY_SECONDS; do
    if [[ ! ${!name} =~ $whole ]]; then bad+=("$name: got ${!name}; allowed are whole numbers from 0 to 999999999"); fi
  done
  if ((${#bad[@]})); then
    printf 'error: %s\n' "${bad[@]}" >&2
    exit 2
  fi
}

if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
  require_settings PROJECT ZONE TPU_NAME ACCELERATOR_TYPE OUT
  for setting in PROJECT ZONE TPU_NAME ACCELERATOR_TYPE RUNTIME_VERSION SPOT OUT \
    POLL_SECONDS RETRY_SECONDS CALL_SECONDS MAX_WAIT_SECONDS MAX_DELETE_SECONDS MAX_RETRIES MAX_FAILURES STEADY_SECONDS; do
    printf '%s=%s\n' "$setting" "${!setting}"
  done
fi
