"""What is importable after ``install()``: modules, and the names in each."""

_INNER = 'mamba_inner_fn bimamba_inner_fn'
_NORMS = ('norms: RMSNorm layer_norm_fn rms_norm_fn layer_norm_linear_fn',)
_CONV = 'conv: causal_conv1d_fn causal_conv1d_update'

#: Module -> its names, each after the module of this package that they come from; ``a=b`` gives
#: the name a to what is called b there. A module with modules below it is a package.
MODULES: dict[str, tuple[str, ...]] = {
    'mamba_ssm': ('versions: __version__=MAMBA_SSM', 'scan: selective_scan_fn',
                  f'inner: {_INNER}', 'mamba_simple: Mamba', 'mamba2: Mamba2'),
    'mamba_ssm.ops': (),
    'mamba_ssm.ops.selective_scan_interface': (
        'scan: selective_scan_fn selective_scan_ref',
        f'inner: {_INNER} mamba_inner_ref bimamba_inner_ref mamba_inner_fn_no_out_proj'),
    'mamba_ssm.ops.triton': (),
    'mamba_ssm.ops.triton.layer_norm': _NORMS,
    'mamba_ssm.ops.triton.layernorm': _NORMS,
    'mamba_ssm.ops.triton.layernorm_gated': (
        'norms_gated: RMSNorm LayerNorm rmsnorm_fn layernorm_fn',),
    'mamba_ssm.ops.triton.selective_state_update': (
        'state_update: selective_state_update',),
    'mamba_ssm.ops.triton.ssd_combined': (
        'ssd: mamba_chunk_scan_combined mamba_split_conv1d_scan_combined',),
    'mamba_ssm.modules': (),
    'mamba_ssm.modules.mamba_simple': ('mamba_simple: Mamba', 'blocks: Block'),
    'mamba_ssm.modules.mamba2': ('mamba2: Mamba2',),
    'mamba_ssm.modules.mamba2_simple': ('mamba2: Mamba2Simple',),
    'mamba_ssm.modules.mamba_simple_scan_norm': ('mamba_forks: Mamba=NormedMamba',),
    'mamba_ssm.modules.mamba_new': ('mamba_forks: Mamba=DecomposedMamba',),
    'mamba_ssm.modules.block': ('blocks: Block=BlockWithMLP',),
    'mamba_ssm.utils': (),
    'mamba_ssm.utils.generation': ('language: GenerationMixin InferenceParams',),
    'mamba_ssm.utils.hf': ('language: load_config_hf load_state_dict_hf',),
    'causal_conv1d': ('versions: __version__=CAUSAL_CONV1D', _CONV),
    'causal_conv1d.causal_conv1d_interface': (
        f'{_CONV} causal_conv1d_ref causal_conv1d_update_ref',),
    'causal_conv1d.cpp_functions': (
        'raw_conv: causal_conv1d_fwd_function causal_conv1d_bwd_function '
        'causal_conv1d_update_function',),
    'causal_conv1d_cuda': (
        'raw_conv: causal_conv1d_fwd causal_conv1d_bwd causal_conv1d_update',),
    'selective_scan_cuda': ('raw_scan: fwd bwd',),
    'selective_scan_cuda_core': ('raw_scan: fwd=core_fwd bwd=core_bwd',),
    'selective_scan_cuda_nrow': ('raw_scan: fwd=core_fwd bwd=core_bwd',),
    'selective_scan_cuda_oflex': ('raw_scan: fwd=oflex_fwd bwd=core_bwd',),
}
#: The names without a dot: whether they are left alone is decided for each of them.
ROOTS = tuple(name for name in MODULES if '.' not in name)


_LANGUAGE = '; vmamba_mm.models.CausalLM reads the files of MambaLMHeadModel'
#: What is not covered -> what is there in its place.
_INSTEAD = {'mamba_ssm.models': _LANGUAGE, 'mamba_ssm.MambaLMHeadModel': _LANGUAGE}


def names_of(module: str) -> dict[str, tuple[str, str]]:
    """The names in a module, with the module of this package and the name there."""
    names = {}
    for entry in MODULES[module]:
        source, _, listed = entry.partition(': ')
        for name in listed.split():
            name, _, original = name.partition('=')
            names[name] = source, original or name
    return names


def not_covered(module: str, name: str | None = None) -> str:
    """What is said of a module, or of a name in one, that ``install()`` does not give: one line."""
    root = module.partition('.')[0]
    there = [] if name is None else [n for n in names_of(module) if not n.startswith('_')]
    if not there:
        there = [n for n in MODULES if n.partition('.')[0] == root and MODULES[n]]
    what = module if name is None else f'{module}.{name}'
    return (f'{what} is not covered by vmamba_mm.dropin, which has {", ".join(there)}'
            f'{_INSTEAD.get(what, "")}')
