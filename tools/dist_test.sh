#!/usr/bin/env bash
# Evaluate with several processes, one for each GPU (without GPUs, on the CPU through gloo).
#
#   tools/dist_test.sh CONFIG CHECKPOINT GPUS [test.py options]
#
# Several machines: run it on each with NNODES, NODE_RANK (0, 1, ...), MASTER_ADDR (of machine 0)
# and PORT in the environment, and the number of GPUs of that machine.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_dist.sh"
[ "${1:-}" = -h ] || [ "${1:-}" = --help ] && usage 0
[ $# -ge 3 ] || usage 2 >&2
launch test.py "$3" "$1" "$2" "${@:4}"
