# shellcheck shell=bash
# What can be wrong here, before a machine is paid for; sourced by lib.sh.
# shellcheck disable=SC2154 # lib.sh sets $here and the rest.
set -euo pipefail

# pack DIRECTORY: DIRECTORY/ckl_jax.tar.gz of the files that git tracks here or does not ignore, but for environments of python.
# Without .git (a tarball) all are new to git. git also lists files that were deleted.
pack() (
  local file environments=()
  cd "$here/.." && unset GIT_DIR GIT_WORK_TREE GIT_INDEX_FILE || return
  if [[ ! -e .git ]]; then
    git init --quiet "$1/none" || return
    export GIT_DIR=$1/none/.git GIT_WORK_TREE=$PWD
  fi
  while IFS= read -r -d '' file; do environments+=("--exclude=/${file%/*}/"); done < <(
    git ls-files -z --others --exclude-standard -- '*/pyvenv.cfg'
  )
  git ls-files -z --cached --others --exclude-standard ${environments[@]+"${environments[@]}"} |
    while IFS= read -r -d '' file; do
      if [[ -e $file || -L $file ]]; then printf '%s\0' "$file"; fi
    done | tar -czf "$1/ckl_jax.tar.gz" --null -T -
)

# preflight: ends with code 2 where something that is missing here would be noticed after the machine is paid for.
preflight() {
  local tool missing='' answer
  for tool in gcloud git tar gzip mktemp; do
    if [[ $tool != gcloud || ! $dry_run ]] && ! command -v "$tool" >/dev/null; then missing+=" $tool"; fi
  done
  if [[ $missing ]]; then fail 2 "not installed, or not on PATH:$missing"; fi
  if [[ ${CKL_PACKED-} ]]; then return; fi # supervise.sh has done it.
  if ! answer=$( (scratch=$(mktemp -d) && trap 'rm -rf "$scratch"' EXIT && pack "$scratch") 2>&1); then
    fail 2 "the files of this checkout cannot be packed: ${answer##*$'\n'}"
  fi
  check_agent
}

# check_agent: ends with code 2 where gcloud would refuse several workers since its key is not in the ssh agent. Without an
# agent, or with an empty one, it reads the key's file.
check_agent() {
  local keys print key=${HOME-}/.ssh/google_compute_engine
  if has_one_worker || ! keys=$(bounded ssh-add -l 2>/dev/null); then return; fi
  if [[ ! -e $key ]]; then
    fail 2 "the ssh agent has keys, and gcloud's is not made yet: ssh-keygen -t rsa -f '$key' && ssh-add '$key'"
  fi
  if print=$(ssh-keygen -lf "$key" 2>/dev/null | cut -d ' ' -f 2) && [[ $keys != *"$print"* ]]; then
    fail 2 "the ssh agent has keys, and gcloud's is not among them: ssh-add '$key'"
  fi
}

has_one_worker() { [[ $ACCELERATOR_TYPE =~ -[1-8]$ ]]; }

# check_hosts MODULE: ends with code 2 where it is for one host, and there are several.
check_hosts() {
  if [[ $1 == experiments.reproduce ]]; then
    fail 2 "MODULE: got $1, which is for one worker, and ${ACCELERATOR_TYPE:-$TPU_NAME} has several: run its items one by one"
  fi
}

# check_command MODULE ARG...: ends with code 2 where it is none that run.sh takes.
check_command() {
  local word
  if ((!$#)); then fail 2 "which module? For example: ${0##*/} experiments.figure4_prioritized_kl --seeds 10"; fi
  if [[ ! $1 =~ ^[A-Za-z_][A-Za-z0-9_]*([.][A-Za-z_][A-Za-z0-9_]*)*$ ]]; then
    fail 2 "MODULE: got $1; allowed is a name as after python -m, for example experiments.figure4_prioritized_kl"
  fi
  if [[ ! ${OUT-} ]]; then return; fi
  for word in "$@"; do
    if [[ $word == --out || $word == --out=* ]]; then fail 2 "$word: OUT is set, and says where results go"; fi
  done
}

# here_python: the path of this checkout's python, or of another that may have its packages.
here_python() { if [[ -x $here/../.venv/bin/python ]]; then echo "$here/../.venv/bin/python"; else echo python3; fi; }

# check_arguments MODULE ARG...: ends with code 2 where this checkout has no such module, or, as far as a python with its
# packages is at hand, the module refuses the arguments or they name what will not be on the machine. What supervise.sh adopts
# ($adopt) may have more.
check_arguments() {
  local root=$here/.. file python word answer code=0
  for word in "$@"; do
    if [[ $word =~ ^--log[-_]to(=|$) ]]; then
      fail 2 "$word: the machine has no TensorBoard and no Weights & Biases; metrics.jsonl in OUT has all that they would show"
    fi
  done
  if [[ ! -e $root/pyproject.toml ]]; then return; fi
  file=$root/${1//.//}
  if [[ -f $file.py ]]; then file=$file.py; else file=$file/__main__.py; fi
  if [[ ! -f $file ]]; then fail 2 "MODULE: got $1; this checkout has no ${file#"$root/"}"; fi
  python=$(here_python)
  if ! grep -q 'cli\.run(' "$file"; then return; fi
  answer=$(export JAX_PLATFORMS=cpu PYTHONDONTWRITEBYTECODE=1 PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" &&
    bounded "$python" "$here/parse.py" ${adopt:+--adopt} "$@" ${OUT:+--out "$OUT"} 2>&1) || code=$?
  if ((code == 2)) && [[ $answer == *"Unrecognized options: --out"* ]]; then
    fail 2 "$1 writes no results: unset OUT, then create.sh, setup.sh, run.sh $1 ..., and delete.sh at the end"
  fi
  if ((code == 2)) && [[ $answer == *error:* && $answer != *"the extra"* ]]; then fail 2 "${answer##*$'\n'}"; fi
}

# check_fits MODULE ARG...: ends with code 2 where the command's programs do not fit the memory of ACCELERATOR_TYPE (preflight's
# code 8), or preflight failed. It looks at commands that ckl_jax.preflight knows, and only where a python with its extra is at
# hand; a chip that it does not know, and a bucket that it cannot read without another extra, it lets pass.
check_fits() {
  local root=$here/.. python name=${1#ckl_jax.} answer line code=0
  python=$(here_python)
  if [[ ! -e $root/ckl_jax/preflight/__main__.py || ! $1 =~ ^ckl_jax\.(pretrain|finetune)$ ]]; then return; fi
  if ! "$python" -c 'import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, ("libtpu", "jax"))))'; then
    say "not compiled beforehand: the extra preflight is not installed"
    return
  fi
  say "compiling $1 for $ACCELERATOR_TYPE (--no-preflight skips this)"
  if [[ $dry_run ]]; then return; fi
  answer=$( (cd "$root" && JAX_PLATFORMS=cpu \
    "$python" -m ckl_jax.preflight --topology "$ACCELERATOR_TYPE" "$name" "${@:2}") 2>&1 |
    while IFS= read -r line; do
      show "$line"
      printf '%s\n' "$line"
    done) || code=$?
  if ((code == 2)) && [[ $answer == *"error: topology:"* || $answer == *"install the extra"* ]]; then
    say "not compiled beforehand, for that reason"
    return
  fi
  if ((code == 8)); then fail 2 "$1 does not fit $ACCELERATOR_TYPE"; fi
  if ((code)); then fail 2 "preflight itself failed (code $code, its output is above); --no-preflight goes past it"; fi
}
