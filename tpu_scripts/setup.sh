#!/usr/bin/env bash
# setup.sh [--dry-run]: copies this checkout to all workers and installs it with the extra `tpu`.
#
# What is copied: files that git tracks, and untracked ones that it does not ignore. The versions are those of uv.lock.
# While a command runs on a worker, that worker is left as it is.
#
# Exit codes: 0 installed on every worker; 2 bad settings; 6 copying or installing failed; 255 workers cannot be
# reached.
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

# checkout_files: names of what is copied, each ended by a zero byte; git also lists files that were deleted.
checkout_files() {
  local file
  git ls-files -z --cached --others --exclude-standard | while IFS= read -r -d '' file; do
    if [[ -e $file || -L $file ]]; then printf '%s\0' "$file"; fi
  done
}

packed=${TMPDIR:-/tmp}/ckl_jax.tar.gz
if [[ ! $dry_run ]]; then
  scratch=$(mktemp -d)
  trap 'rm -rf "$scratch"' EXIT
  packed=$scratch/ckl_jax.tar.gz
  (cd "$here/.." && checkout_files | tar -czf "$packed" --null -T -)
fi

code=0
call gcloud compute tpus tpu-vm scp "$packed" "$here/remote.sh" "$TPU_NAME:" "--project=$PROJECT" "--zone=$ZONE" \
  --quiet --worker=all && on_workers all bash remote.sh install || code=$?
if ((code == 255)); then fail 255 "workers of $TPU_NAME cannot be reached"; fi
if ((code)); then fail 6 "could not be copied or installed, gcloud ended with $code"; fi
say "installed on all workers of $TPU_NAME"
