# Sourced by dist_train.sh and dist_test.sh: start one process of a tool for each GPU.

# usage STATUS: the comment at the head of the script that was called
usage() {
  sed -n '2,7s/^# \{0,1\}//p' "$0"
  exit "$1"
}

# launch TOOL GPUS ARGUMENT...
launch() {
  local tool=$1 gpus=$2 tools python rendezvous
  case $gpus in
    ''|*[!0-9]*|0) echo "error: the number of GPUs must be a whole number from 1, not '$gpus'" >&2
                   exit 2 ;;
  esac
  tools=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
  python=${PYTHON:-python}
  if [ -z "${PYTHON:-}" ] && [ -z "${VIRTUAL_ENV:-}" ] && [ -x "$tools/../.venv/bin/python" ]; then
    python=$tools/../.venv/bin/python
  fi
  if [ "${NNODES:-1}" = 1 ] && [ -z "${PORT:-}" ]; then
    # One machine: any free port, so that two runs do not meet.
    rendezvous=(--standalone)
  else
    rendezvous=(--nnodes "${NNODES:-1}" --node-rank "${NODE_RANK:-0}"
                --master-addr "${MASTER_ADDR:-127.0.0.1}" --master-port "${PORT:-29500}")
  fi
  exec "$python" "$tools/_launch.py" "${rendezvous[@]}" --nproc-per-node "$gpus" \
    "$tools/$tool" "${@:3}" --launcher pytorch
}
