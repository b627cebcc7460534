#!/usr/bin/env bash
# The part that runs on a worker; setup.sh puts it there.
#
#   remote.sh install                  unpacks ~/ckl_jax.tar.gz to ~/ckl_jax, in place of what it unpacked before, and makes
#                                      its venv; results that lie there stay
#   remote.sh busy                     prints "ckl-status busy OTHER" while OTHER runs
#   remote.sh start NAME ATTEMPT ARG...   runs the venv's python with ARG... in the background, once per ATTEMPT
#   remote.sh status NAME              prints "ckl-status running", "exit CODE" or "gone" (ended without a word), and
#                                      "ckl-status busy OTHER" while OTHER runs
#   remote.sh log NAME LINES [follow]  the last lines of its output; NAME may be "latest"
#   remote.sh stop NAME                ends it: SIGTERM, and SIGKILL after 30 s
#
# A run's files are in ~/ckl_runs/NAME: log, exit_code, group (of its processes), attempt, and running, which is locked
# for as long as it runs.
set -euo pipefail
checkout=$HOME/ckl_jax
runs=$HOME/ckl_runs
unpacked=$HOME/ckl_jax.files

is_running() { [[ -e $1/running ]] && ! flock -n -s "$1/running" true; } # Shared: two looks do not see each other.

# other NAME: a run that goes on here and is not NAME, or nothing.
other() {
  local lock run
  for lock in "$runs"/*/running; do
    run=${lock%/running}
    if [[ ${run##*/} != "$1" ]] && is_running "$run"; then
      echo "${run##*/}"
      return
    fi
  done
}

install() {
  if [[ $(other '') ]]; then
    echo "a command is running here: the checkout stays as it is"
    return 1
  fi
  mkdir -p "$checkout"
  cd "$checkout"
  if [[ -e $unpacked ]]; then xargs -0 rm -f -- <"$unpacked"; fi
  rm -rf "$checkout.new"
  mkdir "$checkout.new"
  tar -xzf "$HOME/ckl_jax.tar.gz" -C "$checkout.new"
  (cd "$checkout.new" && find . ! -type d -print0) >"$unpacked"
  cp -a "$checkout.new/." .
  rm -rf "$checkout.new"
  PATH=$HOME/.local/bin:$PATH
  command -v uv >/dev/null || PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv
  uv sync --quiet --frozen --extra tpu --python 3.12
}

start() {
  local attempt=$1
  shift
  exec 9>>running
  if ! flock -w 2 9; then # A look at the lock holds it too, for a moment.
    echo "running already"
  elif [[ -e attempt && $(<attempt) == "$attempt" ]]; then
    echo "started already"
  else
    rm -f exit_code
    printf '%s\n' "$attempt" >attempt
    setsid bash "$script" job "$name" "$@" >>log 2>&1 </dev/null &
  fi
  echo "ckl-status started"
}

# The exit code is written by the shell that waits for python: no pipe, no tee, nothing in between. JAX would take the host's
# CPU for a TPU that does not start, unless platforms are named.
job() {
  local code=0
  trap : HUP INT QUIT TERM # Outlives the python that it waits for.
  echo "$$" >group
  (cd "$checkout" && CKL_HOSTS=auto JAX_PLATFORMS=${JAX_PLATFORMS:-tpu,cpu} exec .venv/bin/python "$@" 9>&-) || code=$?
  echo "$code" >exit_code.new
  sync exit_code.new # Else a host that crashes may keep the name without what it holds.
  mv exit_code.new exit_code
}

# busy NAME: says which other command runs here, if one does.
busy() {
  local busy
  busy=$(other "$1")
  if [[ $busy ]]; then echo "ckl-status busy $busy"; fi
}

status() {
  local busy
  busy=$(busy "$name")
  if is_running .; then # Looked at first: a job writes its exit code before it lets the lock go.
    echo "ckl-status running"
  elif [[ -e exit_code ]]; then
    echo "ckl-status exit $(<exit_code)"
  else
    echo "ckl-status gone"
  fi
  if [[ $busy ]]; then echo "$busy"; fi
}

stop() {
  if is_running .; then
    kill -TERM -- "-$(<group)"
    flock -w 30 running true || kill -KILL -- "-$(<group)"
  fi
}

verb=$1
case $verb in
  install)
    install
    exit
    ;;
  busy)
    busy ''
    exit
    ;;
esac
script=$(cd -- "$(dirname -- "$0")" && pwd)/${0##*/}
name=$2
shift 2
if [[ $name == latest ]]; then
  newest=$(find "$runs" -mindepth 2 -maxdepth 2 -name attempt -printf '%T@ %h\n' | sort -n | tail -n 1)
  name=${newest##*/}
fi
mkdir -p "$runs/$name"
cd "$runs/$name"
case $verb in
  start) start "$@" ;;
  job) job "$@" ;;
  status) status ;;
  log) tail -n "$1" ${2:+-F} log ;;
  stop) stop ;;
  *)
    echo "remote.sh: unknown verb $verb" >&2
    exit 2
    ;;
esac
