#!/usr/bin/env bash
# Make or complete .venv at the root of the checkout; every make target calls this first.
# A second call takes a fraction of a second. Nothing outside .venv (and pip's cache) is touched.
#
#   tools/setup_env.sh           all but mmcv's operators: classification and segmentation run
#   tools/setup_env.sh ops       those too, which detection needs; they have to be compiled
#
#   PYTHON=python3.12            the interpreter for a new .venv (3.10 to 3.13)
#   VMAMBA_MM_TORCH='torch==... torchvision==...'   another pair of releases
#   VMAMBA_MM_CUDA_OPS=0|1       ops: without / with CUDA (default: with CUDA where a GPU and a
#                                matching toolkit are found)
#   MAX_JOBS=N                   ops: compiler processes (default: the number of cores)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PIP_REQUIRE_VIRTUALENV=1 PIP_DISABLE_PIP_VERSION_CHECK=1
unset PYTHONPATH PYTHONHOME

VENV=$PWD/.venv
PY=$VENV/bin/python
STAMP=$VENV/setup.stamp
OPS_STAMP=$VENV/ops.stamp
LOG=$VENV/setup.log
MMCV='onedl-mmcv==2.3.6'
case "$(uname -sm)" in
    # A CPU build exists for this one; it does not bring its triton.
    'Linux aarch64') PAIR='torch==2.9.1 torchvision==0.24.1 triton==3.5.1' ;;
    *) PAIR='torch==2.14.1 torchvision==0.29.1' ;;
esac
PAIR=${VMAMBA_MM_TORCH:-$PAIR}
STARTED=$SECONDS

say() { echo "[setup] $*"; }
die() { say "FAILED: $*" >&2; exit 1; }

# step NAME EXPECTED-TIME COMMAND...: runs it into the log, says how long it took
step() {
    local name=$1 expected=$2 start=$SECONDS
    shift 2
    say "$name ($expected)"
    echo "=== $name: $*" >>"$LOG"
    "$@" >>"$LOG" 2>&1 </dev/null || die "step '$name'; see $LOG"
    say "$name: done in $((SECONDS - start)) s"
}

# compiling NAME EXPECTED-TIME COMMAND...: a step that says every 20 s how far ninja has come
compiling() {
    local parent=$$
    {
        sleep 20 >/dev/null 2>&1
        while kill -0 "$parent" 2>/dev/null; do
            say "  compiled $(grep -oE '^ *\[[0-9]+/[0-9]+\]' "$LOG" | tail -n 1 | tr -d ' []' \
                | sed 's,/, of ,' | grep . || echo nothing yet)"
            sleep 20 >/dev/null 2>&1  # not to hold a pipe open that somebody reads
        done
    } 9>&- &
    local reporter=$!
    trap "kill $reporter 2>/dev/null || true" EXIT
    step "$@"
    kill "$reporter" 2>/dev/null || true
    trap - EXIT
}

# What this .venv was made for. The path is in it because a venv that was moved does not work.
fingerprint() {
    { echo "$VENV|$PAIR|$MMCV"; cat pyproject.toml tools/setup_env.sh; } | cksum
}

ops_fingerprint() { echo "$VENV|$PAIR|$MMCV|${VMAMBA_MM_CUDA_OPS:-}" | cksum; }

ops_complete() { [ -f "$OPS_STAMP" ] && [ "$(cat "$OPS_STAMP")" = "$(ops_fingerprint)" ]; }

base_complete() {
    [ -f "$STAMP" ] && [ "$(cat "$STAMP")" = "$(fingerprint)" ] && "$PY" - <<'EOF' 2>/dev/null
import importlib.util
import sys
names = 'torch torchvision mmcv mmengine mmpretrain mmdet mmseg timm av mlxtend vmamba_mm'.split()
sys.exit(not all(importlib.util.find_spec(name) for name in names))
EOF
}

complete() { { [ "$WANT_OPS" = 0 ] || ops_complete; } && base_complete; }

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3.11 python3 python3.12 python3.10 python3.13}; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' \
            2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    return 1
}

version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }

torch_works() {
    "$PY" -c '
import torch, torchvision
torchvision.ops.nms(torch.rand(4, 4), torch.rand(4), 0.5)
import sys
wanted = dict(item.split("==") for item in sys.argv[1:] if "==" in item)
assert all(m.__version__.split("+")[0] == wanted.get(m.__name__, m.__version__.split("+")[0])
           for m in (torch, torchvision)), "another release is installed"
' $PAIR
}

# mmcv must run its operators, on the GPU too where CUDA operators are wanted.
mmcv_works() {
    WANT_CUDA=$CUDA_OPS "$PY" -c '
import os
import torch
from mmcv.ops import nms, roi_align
for device in ["cpu"] + ["cuda"] * (os.environ["WANT_CUDA"] == "1" and torch.cuda.is_available()):
    box = torch.tensor([[0.0, 0.0, 4.0, 4.0]], device=device)
    assert len(nms(box, torch.ones(1, device=device), 0.5)[1]) == 1
    roi = torch.cat([torch.zeros(1, 1, device=device), box], 1)
    roi_align(torch.rand(1, 1, 8, 8, device=device), roi, (2, 2), 1.0, 0, "avg", True)
'
}

# 1 where a GPU is visible and the CUDA compiler has the major version that torch was built with
choose_cuda_ops() {
    [ -n "${VMAMBA_MM_CUDA_OPS:-}" ] && { echo "$VMAMBA_MM_CUDA_OPS"; return; }
    "$PY" - 2>>"$LOG" <<'EOF' || echo 0
import re
import subprocess

import torch
from torch.utils.cpp_extension import CUDA_HOME
found = 0
if torch.cuda.is_available() and torch.version.cuda and CUDA_HOME:
    text = subprocess.run([f'{CUDA_HOME}/bin/nvcc', '--version'], capture_output=True, text=True)
    release = re.search(r'release (\d+)\.', text.stdout)
    found = int(bool(release) and release[1] == torch.version.cuda.split('.')[0])
print(found)
EOF
}

build_mmcv() {
    # torch needs C++20, and mmcv's setup passes -std=c++17 last: the wrapper has the last word.
    # CFLAGS replaces Python's own flags, so it must ask for optimisation itself.
    local wrapper=$VENV/bin/c++-20
    printf '#!/bin/sh\nexec %s "$@" -std=c++20\n' "${CXX:-c++}" >"$wrapper"
    chmod +x "$wrapper"
    CXX=$wrapper CFLAGS='-O2 -g0 -DNDEBUG' FORCE_CUDA=$CUDA_OPS MMCV_WITH_OPS=1 \
        NVCC_APPEND_FLAGS='-std=c++20' MAX_JOBS=${MAX_JOBS:-$(getconf _NPROCESSORS_ONLN)} \
        "$PY" -m pip install -v --no-build-isolation "$@" "$MMCV"
}

# In the isolated environment in which pip builds there is no torch: mmcv's set-up then leaves the
# operators out. pip must not keep that wheel, which it would take for the one with operators.
install_mmcv_without_ops() {
    "$PY" -m pip install --only-binary onedl-mmcv --no-deps "$MMCV" \
        || "$PY" -m pip install --no-cache-dir --no-deps "$MMCV"
}

install_ops() {
    # A prebuilt wheel if the index has one that works, then pip's cache, then the compiler.
    if "$PY" -m pip install --only-binary onedl-mmcv "$MMCV" && mmcv_works; then return; fi
    "$PY" -m pip uninstall -y onedl-mmcv
    if build_mmcv && mmcv_works; then return; fi
    # What pip had in its cache was built for another torch: build again.
    "$PY" -m pip uninstall -y onedl-mmcv
    build_mmcv --no-cache-dir && mmcv_works
}

install_package() {
    # 'set -e' is off inside a step, hence the returns
    "$PY" -m pip install -c "$VENV/constraints.txt" -e '.[all,dev,demo]' || return 1
    # opencv-python needs libGL, which servers often lack; the headless build does not.
    if ! "$PY" -c 'import cv2'; then
        local release
        release=$("$PY" -m pip show opencv-python-headless | sed -n 's/^Version: //p')
        "$PY" -m pip install --force-reinstall --no-deps "opencv-python-headless==$release" \
            || return 1
    fi
}

final_check() {
    "$PY" -c 'import av, cv2, mmcv, mmengine, mmpretrain, mmdet, mmseg, timm, vmamba_mm.registry
import monai, nibabel, diffusers, torch_fidelity' \
        && "$PY" -m pip check
}

case "${1:-}" in
    '') WANT_OPS=0 ;;
    ops) WANT_OPS=1 ;;
    *) die "'$1' is no argument: there is 'ops', or none" ;;
esac
if complete; then exit 0; fi

mkdir -p "$VENV"
if command -v flock >/dev/null; then  # two make targets at once: the second waits for the first
    exec 9>"$VENV/setup.lock"
    flock 9
    if complete; then exit 0; fi
fi
if base_complete; then HAVE_BASE=1; else HAVE_BASE=0; fi
: >"$LOG"
if ! "$PY" -c '' 2>/dev/null; then
    python=$(find_python) || die "no Python 3.10 to 3.13 found (tried ${PYTHON:-the usual names})"
    say "making .venv with $(command -v "$python") (about 3 minutes and 6 GB the first time)"
    step 'virtual environment' '5 s' "$python" -m venv "$VENV"
elif [ -n "${PYTHON:-}" ] && [ "$(version_of "$PYTHON")" != "$(version_of "$PY")" ]; then
    die ".venv has Python $(version_of "$PY"), PYTHON=$PYTHON asks for another: remove .venv first"
else
    say 'completing .venv'
fi

if [ "$HAVE_BASE" = 0 ]; then
    rm -f "$STAMP"
    if torch_works >>"$LOG" 2>&1; then
        say "torch: already there"
    else
        step 'torch' '1 minute from disk, more over the network' "$PY" -m pip install $PAIR
        torch_works >>"$LOG" 2>&1 || die "step 'torch': installed but does not run; see $LOG"
    fi
    step 'build tools' '5 s' "$PY" -m pip install 'pip==25.3' 'setuptools>=77,<81' wheel packaging
    "$PY" -m pip freeze | grep -E '^(torch|torchvision|triton)==' >"$VENV/constraints.txt"
    if [ "$("$PY" -m pip show onedl-mmcv 2>/dev/null | sed -n 's/^Version: //p')" = \
        "${MMCV#*==}" ]; then
        say 'mmcv: already there'
    else
        step 'mmcv without operators' '10 s' install_mmcv_without_ops
    fi
    step 'vmamba_mm with mmdet, mmseg, mmpretrain' '40 s' install_package
    step 'check' '20 s' final_check
    fingerprint >"$STAMP"
fi

if [ "$WANT_OPS" = 1 ]; then
    step 'compiler driver' '2 s' "$PY" -m pip install ninja psutil
    CUDA_OPS=$(choose_cuda_ops)
    if mmcv_works >>"$LOG" 2>&1; then
        say "mmcv: its operators are there already, and run"
    elif [ "$CUDA_OPS" = 1 ]; then
        compiling 'mmcv with CUDA operators' 'compiles once: 10 minutes or more' install_ops
    else
        if "$PY" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
            say 'a GPU, but no CUDA toolkit that fits: mmcv gets CPU operators; classification and' \
                'segmentation run on the GPU, detection on the CPU'
        fi
        compiling 'mmcv with CPU operators' \
            '5 minutes on 2 cores the first time, then from pip'"'"'s cache' install_ops
    fi
    step 'check' '5 s' "$PY" -m pip check
    ops_fingerprint >"$OPS_STAMP"
fi
say "ready in $((SECONDS - STARTED)) s: $("$PY" --version), $(tr '\n' ' ' <"$VENV/constraints.txt")"
