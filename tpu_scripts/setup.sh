#!/usr/bin/env bash
# setup.sh [--dry-run]: copies this checkout to all workers and installs it with the extra `tpu`.
#
# What is copied: files that git tracks, and untracked ones that it does not ignore (without .git: all that .gitignore
# leaves), or what supervise.sh packed of it before (CKL_PACKED). The versions are those of uv.lock. While a command
# runs on one worker, all workers are left as they are: they compute as one program, from the same files.
#
# Exit codes: 0 installed on every worker, or every worker left to a command that runs; 2 bad settings; 6 packing, copying or
# installing failed; 255 workers cannot be reached, or there is no machine (any more); 129, 130, 131, 143 interrupted.
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

packed=${TMPDIR:-/tmp}/ckl_jax.tar.gz scratch=
# shellcheck disable=SC2329 # The traps call it.
clean_up() {
  if [[ $scratch ]]; then rm -rf "$scratch"; fi
  return "$1"
}
at_end clean_up
if [[ ! $dry_run ]]; then
  if ! { scratch=$(mktemp -d) && { [[ ${CKL_PACKED-} ]] || pack "$scratch"; }; }; then
    fail 6 "the files of this checkout could not be packed"
  fi
  packed=${CKL_PACKED:-$scratch/ckl_jax.tar.gz}
fi

# attempt COMMAND...: sets `said`. Ends with 255 or 6 where it fails.
attempt() {
  local code=0 state answer=${scratch:+$scratch/answer}
  step long "$@" >"${answer:-/dev/null}" 2>&1 || code=$?
  if [[ $answer ]]; then answer=$(<"$answer"); fi
  show "$answer"
  if ((!code)); then
    said=$answer
    return
  fi
  if is_out_of_reach "$code" "$answer"; then fail 255 "workers of $TPU_NAME cannot be reached"; fi
  state=$(state_of ACTIVE)
  if is_dead "$state"; then fail 255 "$TPU_NAME is $state"; fi
  fail 6 "could not be copied or installed, gcloud ended with $code"
}
attempt call gcloud compute tpus tpu-vm scp "$packed" "$here/remote.sh" "$worker_login:" "--project=$PROJECT" "--zone=$ZONE" \
  --quiet --worker=all --scp-flag=-oBatchMode=yes
attempt on_workers all bash remote.sh busy
if [[ $said =~ ckl-status\ busy\ ([^[:space:]]+) ]]; then
  say "${BASH_REMATCH[1]} runs on $TPU_NAME: all workers are left as they are, nothing is installed"
  exit
fi
attempt on_workers all bash remote.sh install
say "installed on all workers of $TPU_NAME"
