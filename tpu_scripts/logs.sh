#!/usr/bin/env bash
# logs.sh [--dry-run] [--worker N] [--lines N] [--follow]: what the newest command printed on a worker (0).
#
# Exit codes: 0; 2 bad settings; else gcloud's.
set -euo pipefail
# shellcheck source=lib.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"

worker=0 lines=100 follow=()
while (($#)); do
  case $1 in
    --dry-run) dry_run=1 ;;
    --follow) follow=(follow) ;;
    --worker | --lines)
      if [[ ! ${2-} =~ ^[0-9]+$ ]]; then fail 2 "$1 needs a number"; fi
      if [[ $1 == --worker ]]; then worker=$2; else lines=$2; fi
      shift
      ;;
    --help) usage && exit ;;
    *) bad_option "$1" ;;
  esac
  shift
done
require_settings PROJECT ZONE TPU_NAME
# shellcheck disable=SC2034 # lib.sh reads it.
unlimited=1
on_workers "$worker" bash remote.sh log latest "$lines" ${follow[@]+"${follow[@]}"}
