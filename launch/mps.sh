#!/usr/bin/env bash
# NVIDIA's Multi-Process Service (MPS) for your own processes: server and trainer run side by side on the SMs instead of in turns.
#   eval "$(launch/mps.sh start)"      start the control daemon, and export where it listens; then start server and trainer
#   launch/mps.sh status | stop        status: 0 it runs, 3 it does not; stop ends it, with the processes that still use it
# The daemon's pipes and logs lie below CUDA_MPS_PIPE_DIRECTORY and CUDA_MPS_LOG_DIRECTORY, by default in a private folder, so that
# nobody else's processes join. The cards' settings (compute mode, clocks) stay as they are. Nothing here needs root.
set -euo pipefail
umask 077
base="${XDG_RUNTIME_DIR:-/tmp}/apollo_tp-mps-$(id -u)"
export CUDA_MPS_PIPE_DIRECTORY="${CUDA_MPS_PIPE_DIRECTORY:-$base/pipe}" CUDA_MPS_LOG_DIRECTORY="${CUDA_MPS_LOG_DIRECTORY:-$base/log}"
readonly SECONDS_TO_ANSWER=10 SECONDS_TO_STOP=30

fail() {
  echo "mps.sh: $*" >&2
  exit 1
}

ask() { # one command to the daemon, which may hang if a card does
  echo "$1" | timeout "$2" nvidia-cuda-mps-control
}

runs() {
  [ -e "$CUDA_MPS_PIPE_DIRECTORY/nvidia-cuda-mps-control.pid" ] && ask get_server_list "$SECONDS_TO_ANSWER" >/dev/null 2>&1
}

private_folder() { # /tmp is everybody's: somebody else may have made the folder, or a link in its place
  mkdir -p "$1"
  if [ -L "$1" ] || [ ! -O "$1" ]; then
    fail "$1: got a link or another user's folder, expected one of your own; set CUDA_MPS_PIPE_DIRECTORY and CUDA_MPS_LOG_DIRECTORY"
  fi
  chmod 700 "$1"
}

start() {
  command -v nvidia-cuda-mps-control >/dev/null || fail "got no nvidia-cuda-mps-control on PATH, expected NVIDIA's driver tools"
  private_folder "$base"
  private_folder "$CUDA_MPS_PIPE_DIRECTORY"
  private_folder "$CUDA_MPS_LOG_DIRECTORY"
  local log="$CUDA_MPS_LOG_DIRECTORY/start.log"
  if ! runs; then
    # the daemon inherits what it is given: our own output would keep the caller's $(...) waiting
    timeout "$SECONDS_TO_ANSWER" nvidia-cuda-mps-control -d </dev/null >"$log" 2>&1 ||
      fail "the daemon did not start within $SECONDS_TO_ANSWER s: $(cat "$log")"
    for _ in $(seq "$SECONDS_TO_ANSWER"); do
      if runs; then break; fi
      sleep 1
    done
    runs || fail "got no answer of the daemon for $SECONDS_TO_ANSWER s; see $log and $CUDA_MPS_LOG_DIRECTORY/control.log"
  fi
  echo "export CUDA_MPS_PIPE_DIRECTORY='$CUDA_MPS_PIPE_DIRECTORY' CUDA_MPS_LOG_DIRECTORY='$CUDA_MPS_LOG_DIRECTORY'"
}

stop() {
  runs || return 0
  ask "quit -t $SECONDS_TO_ANSWER" "$SECONDS_TO_STOP" >&2 || fail "the daemon did not take the command to quit"
  for _ in $(seq "$SECONDS_TO_STOP"); do
    runs || return 0
    sleep 1
  done
  fail "the daemon still answers after $SECONDS_TO_STOP s; see $CUDA_MPS_LOG_DIRECTORY/control.log"
}

status() {
  if ! runs; then
    echo "no MPS control daemon in $CUDA_MPS_PIPE_DIRECTORY"
    exit 3
  fi
  local servers
  servers="$(ask get_server_list "$SECONDS_TO_ANSWER" | paste -sd' ')"
  echo "an MPS control daemon runs in $CUDA_MPS_PIPE_DIRECTORY; its servers: ${servers:-none yet}"
}

case "${1:-}" in
  start | stop | status) "$1" ;;
  *) fail "got '${1:-}', expected start, stop or status" ;;
esac
