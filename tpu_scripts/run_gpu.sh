#!/usr/bin/env bash
# run_gpu.sh [--dry-run] SCALE DIRECTORY: one stage of the paper's experiments on this GPU host. SCALE is small or gpt2.
#
# A stage ends after STAGE_SECONDS (540), and GRACE_SECONDS (60) at most to save, with what it has made in DIRECTORY; the same
# command is the next stage. Exit code 75: there is more to do. 0: DIRECTORY/report.html is complete. 129, 130, 131, 143:
# interrupted, what was made is saved. 2: bad arguments, or STAGE_SECONDS in which nothing was saved: neither a checkpoint nor
# an item's results. Anything else: what failed.
#
#   until tpu_scripts/run_gpu.sh small runs/small; do [ $? -eq 75 ] || break; done
#
# Pre-trains N = DIGITS (7) until ACCURACY (0.99) of greedy answers of up to N digits are right, then ITEMS (table1 figure2
# figure4 figure6) with SEEDS (10) seeds. PRETRAIN is more settings of pre-training ("--num-steps 200 --warmup-steps 10"),
# OPTIONS more of reproduce's items, a line each ("figure4: --rounds 2 --test-every 1"), PYTHON the interpreter.
# What the items would refuse is refused before the pre-training.
set -euo pipefail
trap '' PIPE XFSZ # A log that nobody reads, or that does not fit, ends no stage.
: 3>&2 || exec 2>/dev/null
{ : 3>&1; } 2>/dev/null || exec >/dev/null

dry_run=
if [[ ${1-} == --dry-run ]]; then
  dry_run=yes
  shift
fi
if (($# != 2)) || [[ $1 != small && $1 != gpt2 ]]; then
  echo "run_gpu.sh: got '$*', allowed is [--dry-run] small|gpt2 DIRECTORY" >&2
  exit 2
fi
started=$(date +%s)
scale=$1 directory=$2 digits=${DIGITS:-7} seconds=${STAGE_SECONDS:-540} grace=${GRACE_SECONDS:-60}
if ! [[ $seconds =~ ^[1-9][0-9]*$ && $grace =~ ^[1-9][0-9]*$ && $digits =~ ^[1-9][0-9]?$ ]]; then
  echo "run_gpu.sh: got STAGE_SECONDS=$seconds, GRACE_SECONDS=$grace, DIGITS=$digits, allowed are whole numbers above 0" >&2
  exit 2
fi
read -d '' -ra items <<<"${ITEMS:-table1 figure2 figure4 figure6}" || true # Of all lines: it ends with 1 where they end.
read -d '' -ra pretrain <<<"--target-accuracy ${ACCURACY:-0.99} ${PRETRAIN-}" || true
if ((!${#items[@]})); then
  echo "run_gpu.sh: got ITEMS='$ITEMS', allowed are names of reproduce's items" >&2
  exit 2
fi
for word in "${pretrain[@]}"; do
  if [[ $word =~ ^--(task|scale|max[-_]digits|out|data[-_]dir|quiet|no[-_]quiet|log[-_]to)(=|$) ]]; then
    echo "run_gpu.sh: got PRETRAIN=$PRETRAIN, allowed are settings of pre-training but ${word%%=*}" >&2
    exit 2
  fi
done
models="--digits $digits ${pretrain[*]/#--/--pretrain.}" # For figures 2 and 3: the model that is there, not another one.
options=("figure2: $models" "figure3: $models")
while IFS= read -r line; do
  if [[ $line == *[![:space:]]* ]]; then options+=("$line"); fi
done <<<"${OPTIONS-}"
model=$directory/pretrained/${scale}_N$digits

# stop CODE: ends the stage, which saves its work first.
stop() {
  local child
  trap '' HUP INT QUIT TERM
  set +eu
  for child in $(jobs -p); do
    kill -TERM "$child" 2>/dev/null
    wait "$child"
  done
  exit "$1"
}
for signal in 129:HUP 130:INT 131:QUIT 143:TERM; do
  # shellcheck disable=SC2064
  trap "stop ${signal%:*}" "${signal#*:}"
done

# SIGTERM saves the work (exit code 75). It comes twice, and may find a program that has saved and is ending, or has not
# begun (143). What does not end in GRACE_SECONDS is killed (137), and goes on from its last checkpoint, if it has made one.
stage() {
  local code=0
  if [[ $dry_run ]]; then
    printf '%q ' "$@"
    echo
    return
  fi
  timeout --preserve-status --signal=TERM --kill-after="$grace" "$((SECONDS < seconds ? seconds - SECONDS : 1))" "$@" &
  wait "$!" || code=$?
  if ((SECONDS >= seconds && (code == 75 || code == 137 || code == 143))) && ! is_anything_saved; then
    echo "run_gpu.sh: STAGE_SECONDS: got $seconds, in which $3 saved nothing; allowed is more" >&2 || true
    code=2
  elif ((code == 75 || ((code == 137 || code == 143) && SECONDS >= seconds))); then
    echo "run_gpu.sh: this stage is over; the same command goes on" || true
    exit 75
  fi
  return "$code"
}

# is_anything_saved: in this stage, so that the next one begins further on: every checkpoint gets a manifest, and an item that
# has been measured results.json.
is_anything_saved() {
  local names=('(' -name '*.sha256.json' -o -name results.json ')')
  [[ $(find "$directory/" "${names[@]}" -newermt "@$started" -print -quit 2>/dev/null) ]]
}

python=${PYTHON:-python}
reproduce=(experiments.reproduce --scale "$scale" --checkpoint "$model" --out "$directory" --items "${items[@]}"
  --seeds "${SEEDS:-10}" --options "${options[@]}")
if [[ ! $dry_run ]]; then # Hours of pre-training come first: items, seeds and options are read now.
  here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
  JAX_PLATFORMS=cpu PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" "$python" "$here/parse.py" --here "${reproduce[@]}" &
  wait "$!" || exit
fi
stage "$python" -m ckl_jax.pretrain --scale "$scale" --max-digits "$digits" "${pretrain[@]}" --out "$model"
stage "$python" -m "${reproduce[@]}"
