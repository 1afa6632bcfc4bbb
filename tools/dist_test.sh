#!/usr/bin/env bash
# Evaluate with several processes, one for each GPU (without GPUs, on the CPU through gloo).
#
#   tools/dist_test.sh CONFIG CHECKPOINT GPUS [test.py options]
#
# Several machines: run it on each with NNODES, NODE_RANK (0, 1, ...), MASTER_ADDR (of machine 0)
# and PORT in the environment, and the number of GPUs of that machine.
set -euo pipefail
usage() { sed -n '2,7s/^# \{0,1\}//p' "$0"; exit "$1"; }
[ "${1:-}" = -h ] || [ "${1:-}" = --help ] && usage 0
[ $# -ge 3 ] || { usage 2 >&2; }
config=$1 checkpoint=$2 gpus=$3
args=("$config" "$checkpoint" "${@:4}")
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
  "$tools/test.py" "${args[@]}" --launcher pytorch
