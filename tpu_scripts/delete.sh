#!/usr/bin/env bash
# delete.sh [--dry-run]: deletes the TPU and its queued resource, and looks whether they are gone.
#
# Exit codes: 0 there is none (any more); 2 bad settings; 7 it is still there, and may be paid for.
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

state=$(state_of ACTIVE)
for try in 1 2 3 4 5; do
  if [[ $state == ABSENT ]]; then
    say "there is no $TPU_NAME; nothing is paid for"
    exit 0
  fi
  if ((try > 1)); then pause "$POLL_SECONDS"; fi
  if queued delete --force; then say "deleted $TPU_NAME"; fi
  state=$(state_of ABSENT)
done
if [[ $state != ABSENT ]]; then
  fail 7 "$TPU_NAME IS STILL THERE ($state) AND MAY BE PAID FOR: run delete.sh again, or delete it in the console"
fi
