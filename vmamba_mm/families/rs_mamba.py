"""RS-Mamba (arXiv 2404.02668): its published architecture and the names of its weights.

RSM-SS segments one image, RSM-CD finds the changes between two; both are an encoder of VMamba's
blocks with eight routes, and a decoder. Not to be confused with RSMamba (arXiv 2403.19654), a
classifier, and RS3Mamba.
"""

from collections.abc import Collection, Mapping
from typing import Any

from vmamba_mm.families import vmamba
from vmamba_mm.families.base import Family, Rows, one_of
from vmamba_mm.families.parity import Build, Call, Limit, Omission, Options, Parity, Subject

#: 'tiny' is the only size that was published.
ARCHS = {'tiny': dict(embed_dims=96, depths=(2, 2, 9, 2), d_state=16, ssm_ratio=2.0,
                      dt_rank='auto', mlp_ratio=4.0)}
_KEYS_OF_ARCH = tuple(ARCHS['tiny'])
#: Of the scan, as published first.
SCANS = 'omnidirectional', 'omnidirectional-unwrapped'
RULES = {**{key: vmamba.RULES[key] for key in _KEYS_OF_ARCH}, 'scan': one_of(*SCANS).or_absent()}
#: What VMamba's arch says beside, of all models of this family.
FIXED = dict(conv_bias=True, gate=True, stem='conv', downsample='conv')


def _check(arch: Mapping[str, Any]) -> None:
    vmamba.FAMILY.check({**arch, **FIXED, 'scan': 'cross'})


# --- names of weights -------------------------------------------------------------------------

# The official stages begin with a downsampling, ours end with it: the same layers in the same
# order.
_KEYS = (
    ('patch_embed.0', 'patch_embed.conv1'), ('patch_embed.2', 'patch_embed.norm1'),
    ('patch_embed.5', 'patch_embed.conv2'), ('patch_embed.7', 'patch_embed.norm2'),
    *(row for i in range(4) for row in (
        (f'encoder_block{i + 1}.blocks.#.norm', f'stages.{i}.blocks.#.norm1'),
        (f'encoder_block{i + 1}.blocks.#.op', f'stages.{i}.blocks.#.ssm'),
        (f'encoder_block{i + 1}.blocks.#.norm2', f'stages.{i}.blocks.#.norm2'),
        (f'encoder_block{i + 1}.blocks.#.mlp', f'stages.{i}.blocks.#.mlp'))),
    *(row for i in range(3) for row in (
        (f'encoder_block{i + 2}.downsample.1', f'stages.{i}.downsample.conv'),
        (f'encoder_block{i + 2}.downsample.3', f'stages.{i}.downsample.norm'))))
_DECODER = 'decode_head.decoder.'


def _head_keys(names: Collection[str]) -> Rows:
    """'deocder' is how the official files write it."""
    is_pair = any(name.startswith(('fuse_block', 'neck.')) for name in names)
    return (
        *(row for i in range(3) for row in (
            (f'deocder_block{i + 1}.fuse.0', f'{_DECODER}blocks.{i}.conv'),
            (f'deocder_block{i + 1}.fuse.1', f'{_DECODER}blocks.{i}.norm'))),
        ('upsample_x4.0', f'{_DECODER}up1.conv'), ('upsample_x4.1', f'{_DECODER}up1.norm'),
        ('upsample_x4.4', f'{_DECODER}up2.conv'), ('upsample_x4.5', f'{_DECODER}up2.norm'),
        ('conv_out_change' if is_pair else 'conv_out_seg', f'{_DECODER}conv_out'),
        *(row for i in range(4) for row in (
            (f'fuse_block{i + 1}.fuse.0', f'neck.fuse.{i}.conv'),
            (f'fuse_block{i + 1}.fuse.1', f'neck.fuse.{i}.norm')) if is_pair))


def _infer_arch(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Whether diagonals are wrapped leaves no trace."""
    arch = vmamba.infer_arch(weights, 8)
    other = {key: arch.get(key) for key, value in FIXED.items() if arch.get(key) != value}
    if other or set(arch) - set(FIXED) - set(_KEYS_OF_ARCH) != {'scan'}:
        raise ValueError(f'a VMamba of {other or arch}')
    return {key: arch[key] for key in _KEYS_OF_ARCH}


# --- the official code's numbers ----------------------------------------------------------------

def _parity_subject(file: str, options: Options) -> Subject:
    """RSM_SS or RSM_CD, by the name of the file, or what is noted in it."""
    kwargs = options['kwargs']
    dims = kwargs['dims']
    kwargs.ignore('drop_path_rate')  # of training; the numbers are of 0
    arch = dict(embed_dims=dims if isinstance(dims, int) else tuple(dims),
                depths=tuple(kwargs['depths']), d_state=kwargs['ssm_d_state'],
                ssm_ratio=kwargs['ssm_ratio'], dt_rank=kwargs['ssm_dt_rank'],
                mlp_ratio=kwargs['mlp_ratio'])
    is_pair = file.startswith('cd') or 'RSM_CD' in options.get('note', '')
    return Subject(Build('vmamba_mm.heads:RemoteSensingModel', dict(
        arch=arch, num_images=2 if is_pair else 1)), Call(method='forward_images'))


def _parity_op(section: str, case: Options) -> Subject:
    """The order of the routes, the map along them and back, or all of the op."""
    scan = dict(scan=SCANS[0])
    if section == 'perm':
        return Subject(Build('vmamba_mm.ops:scan_positions', dict(
            scan, height=case['H'], width=case['W'])), Call(args=(), outputs=('index',)))
    if section == 'scan_merge':
        return Subject(Build('vmamba_mm.testing:gather_and_merge', scan),
                       Call(args=('x', 'ys'), outputs=('scan', 'merge')))
    case.ignore('R', 'N')
    names = 'x_proj_weight', 'dt_projs_weight', 'dt_projs_bias', 'A_logs', 'Ds'
    return Subject(Build('vmamba_mm.testing:run_ordered_scan', scan),
                   Call(args=('x', *names), outputs=('y_bhwc',), gradients={'grad_y': 'y_bhwc'}))


PARITY = Parity(
    subject=_parity_subject, ops={'op_scan8.pt': _parity_op},
    absences=(Omission('grad_params', 'are stored of the case in eval mode alone', '*.pth',
                       '* train'),),
    limits=(Limit('grad_*', 3e-4, 'the stored gradients, of fp32, are up to 1.1e-4 off those of '
                  'fp64', '*.pth'),))

FAMILY = Family(
    name='rs_mamba', model='RemoteSensingMamba', archs=ARCHS, rules=RULES, check=_check,
    keys=_KEYS, head_keys=_head_keys, task='seg',
    signature=('stages.0.blocks.0.ssm.A_logs', 'stages.0.blocks.0.norm1.weight',
               *(f'stages.{i}.blocks.0.ssm.{name}' for i in range(4) for name in (
                   'in_proj.weight', 'x_proj_weight', 'dt_projs_bias', 'A_logs', 'Ds',
                   'out_proj.weight')),
               *(f'stages.{i}.downsample.norm.weight' for i in range(3))),
    first_convs=('patch_embed.conv1.weight',), infer_arch=_infer_arch, weights_key='net',
    parity=PARITY, licence='Apache-2.0, as its README says; there is no licence file',
    url='https://github.com/walking-shadow/Official_Remote_Sensing_Mamba')
