#!/usr/bin/env bash
# Train with several processes, one for each GPU (without GPUs, on the CPU through gloo).
#
#   tools/dist_train.sh CONFIG GPUS [train.py options]
#
# Several machines: run it on each with NNODES, NODE_RANK (0, 1, ...), MASTER_ADDR (of machine 0)
# and PORT in the environment, and the number of GPUs of that machine.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_dist.sh"
[ "${1:-}" = -h ] || [ "${1:-}" = --help ] && usage 0
[ $# -ge 2 ] || usage 2 >&2
launch train.py "$2" "$1" "${@:3}"
