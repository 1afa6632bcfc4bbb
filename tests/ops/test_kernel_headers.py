"""The headers of kernels/: each stands by itself, and a helper that several need lives once."""

import re
import shutil
from collections import defaultdict

import pytest
from kernel_folder import needs_nvrtc

from vmamba_mm.ops.core import compile
from vmamba_mm.ops.core.compile import Instance
from vmamba_mm.paths import KERNELS

HEADERS = sorted(path.relative_to(KERNELS).as_posix() for path in KERNELS.rglob('*.cuh'))
#: A function that is neither a kernel nor in a struct, up to the end of its parameters.
FUNCTION = re.compile(r'^__device__ [^(]*?(\w+)\((.*?)\) {', re.M | re.S)
NAME = re.compile(r'\w+(?=\)?(?:\[[^]]*])*$)')  # of a parameter: of `float (&x)[4]` x


def find_functions(text):
    """The (name, types of the parameters) of the free functions of a source."""
    for name, parameters in FUNCTION.findall(text):
        yield name, tuple(' '.join(NAME.sub('', parameter).split())
                          for parameter in parameters.split(','))


def find_repeated(sources):
    """The free functions of one name and the same parameters in several sources (path to text)."""
    places = defaultdict(set)
    for path, text in sources.items():
        for function in find_functions(text):
            places[function].add(path)
    return {name: sorted(paths) for (name, _), paths in places.items() if len(paths) > 1}


@needs_nvrtc
@pytest.mark.parametrize('header', HEADERS)
def test_a_header_compiles_by_itself_and_twice(header, tmp_path):
    folder = tmp_path / 'kernels'
    shutil.copytree(KERNELS, folder)
    (folder / 'alone.cu').write_text(
        f'#include "{header}"\n#include "{header}"\n__global__ void nothing() {{}}\n')
    with compile.override_cache(tmp_path / 'cache', folder):
        for arch in ('sm_75', 'sm_90'):
            compile.build(Instance('alone.cu', 'nothing'), arch)


def test_helpers_live_once():
    """Two headers with a function of their own of one name cannot be included together."""
    sources = {path.relative_to(KERNELS).as_posix(): path.read_text()
               for path in KERNELS.rglob('*.cu*')}
    assert len(sources) > 60 and sum(len([*find_functions(t)]) for t in sources.values()) > 100
    assert find_repeated(sources) == {}, 'put these into kernels/common, once'


def test_a_repeated_helper_is_found():
    one = '__device__ __forceinline__ float twice(float x) { return x + x; }\n'
    other = '__device__ float twice(float y) { return 2.f * y; }\n'
    overload = '__device__ void twice(float (&x)[2]) { x[0] += x[0]; }\n'
    inside = 'struct Two {\n    __device__ float twice(float x) { return x + x; }\n};\n'
    assert find_repeated({'a.cuh': one, 'b.cuh': other}) == {'twice': ['a.cuh', 'b.cuh']}
    assert find_repeated({'a.cuh': one, 'b.cuh': overload, 'c.cuh': inside}) == {}
