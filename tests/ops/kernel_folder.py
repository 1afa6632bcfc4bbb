"""A kernels folder for the tests of what compiles and launches, and ways to skip them."""

import contextlib

import pytest

from vmamba_mm.ops.core import compile, launch
from vmamba_mm.ops.core.launch import Instance

SOURCE = r'''
#include "add.cuh"

struct Add {
    float *out;
    const float *a, *b;
    int n;
};

extern "C" __global__ void add(const Add p) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < p.n) p.out[i] = plus(p.a[i], p.b[i]) * SCALE;
}

// Every kind of field. The 4-byte one before the 8-byte one makes a hole.
template <typename T>
struct Kinds {
    T *out;
    int i;
    long long q;
    float f;
    double d;
    int last;
};

template <typename T, int N>
__global__ void kinds(const __grid_constant__ Kinds<T> p) {
    T values[] = {T(p.i), T(p.q), T(p.f), T(p.d), T(p.last), T(N)};
    if (threadIdx.x < 6) p.out[threadIdx.x] = values[threadIdx.x];
}

struct Reverse {
    float *x;
    int spread;
};

// Reverses a block's elements through dynamic shared memory, spread over all of it.
__global__ void reverse(const Reverse p) {
    extern __shared__ float dynamic[];
    dynamic[threadIdx.x * p.spread] = p.x[threadIdx.x];
    __syncthreads();
    p.x[threadIdx.x] = dynamic[(blockDim.x - 1 - threadIdx.x) * p.spread];
}

__global__ void nothing() {}

__global__ void loose(float *out, int n) {}
'''
HEADER = '''#pragma once
#include "plus.cuh"
'''
INNER = '__device__ inline float plus(float a, float b) { return a + b; }\n'


def has_nvrtc() -> bool:
    with contextlib.suppress(compile.NvrtcNotFound):
        return bool(compile.find_nvrtc())
    return False


needs_nvrtc = pytest.mark.skipif(not has_nvrtc(), reason='this torch came without NVRTC')
needs_gpu = pytest.mark.gpu(nvidia=True)


@pytest.fixture
def kernels_folder(tmp_path):
    """A kernels folder and an empty cache; nothing compiled before is remembered."""
    for name, text in (('add.cu', SOURCE), ('add.cuh', HEADER), ('plus.cuh', INNER)):
        (tmp_path / name).write_text(text)
    with compile.override_cache(tmp_path / 'cache', tmp_path), launch.override_loader():
        yield tmp_path


def instance(name='add', scale='1.f', options=()):
    return Instance('add.cu', name, defines=(('SCALE', scale),), options=options)


KINDS = instance('kinds<double, 7>')


@pytest.fixture
def compilations(monkeypatch):
    """The names compiled by NVRTC, as they happen."""
    names, compile_ = [], compile.Nvrtc.compile

    def counted(self, files, name, options):
        names.append(name)
        return compile_(self, files, name, options)

    monkeypatch.setattr(compile.Nvrtc, 'compile', counted)
    return names
