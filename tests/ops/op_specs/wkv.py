from dataclasses import replace

from op_specs import Spec, cut, randn
from vmamba_mm.ops import bi_wkv, wkv

NAMES = 'w', 'u', 'k', 'v'


def make(batch, length, channels):
    """With keys that differ by a factor of exp(20) and more."""
    return dict(w=randn(channels), u=randn(channels, seed=1),
                k=8 * randn(batch, length, channels), v=randn(batch, length, channels, seed=2))


def make_slow(batch, length, channels):
    """As Vision-RWKV passes it: with a decay by the number of tokens, of both signs."""
    inputs = make(batch, length, channels)
    return inputs | dict(w=4 * inputs['w'] / length, u=inputs['u'] / length, k=inputs['k'] / 4)


def make_official(batch, length, channels):
    """So that no denominator is near 0, as they can be where tokens of a block count less than
    nothing."""
    inputs = make_slow(batch, length, channels)
    return inputs | dict(w=inputs['w'] / 4)


def make_stateful(batch, length, channels):
    state = randn(batch, 3, channels, seed=3)
    state[:, 1].exp_()
    return make(batch, length, channels) | dict(state=state)


def spec(final=False, **kwargs):
    def call(inputs, **options):
        found = wkv(*map(inputs.get, NAMES), state=inputs.get('state'), return_state=final,
                    **options)
        # In the dtype of the result, which generic tests look at.
        return (found[0], found[1].to(found[0].dtype)) if final else found

    return Spec(
        'wkv_fwd', call=call,
        arguments=lambda inputs, out_dtype: (*map(inputs.get, (*NAMES, 'state')), final),
        maps=('v', 'k') + (('state',) if final else ()), backends=('reference', 'chunked', 'cuda'),
        takes_out_dtype=False,
        flops=lambda shape: 12 * shape[0] * shape[1] * shape[2], **kwargs)


def blocks_of(k):
    """Of the official mode: 4, but of at most 33 tokens, as those of the models are."""
    return max(4, k.shape[-2] // 32)


def bi_spec(mode, **kwargs):
    return Spec(
        'bi_wkv_fwd',
        call=lambda inputs, **options: bi_wkv(*map(inputs.get, NAMES), mode=mode,
                                              blocks=blocks_of(inputs['k']), **options),
        arguments=lambda inputs, out_dtype: (
            *map(inputs.get, NAMES),
            *((blocks_of(inputs['k']), 1e-6) if mode == 'official' else (0, 0.0))),
        maps=('v', 'k'), takes_out_dtype=False,
        backends=('reference', 'chunked', 'cuda'),
        flops=lambda shape: 24 * shape[0] * shape[1] * shape[2], **kwargs)


WRONG = (('v', lambda v: v[0], r'wkv expects v \(B, T, C\)'), ('k', cut(1), 'expects k of shape'),
         ('w', cut(0), 'expects w of shape'), ('u', cut(0), 'expects u of shape'),
         ('k', lambda k: k.half(), 'of one real dtype'))
KERNELS = dict(
    kernel_shapes=((2, 21, 3), (1, 2, 1), (1, 70, 40), (2, 100, 5)),
    half_shapes=((2, 21, 3), (1, 70, 40)),
    gpu_shapes=((8, 196, 384), (3, 256, 40), (2, 197, 33), (1, 5000, 64), (1, 20000, 8)))
SPECS = [
    spec(make=make, shapes=((2, 5, 3), (1, 2, 1), (3, 17, 4), (1, 50, 2)), wrong=WRONG,
         **KERNELS),
    # The p of a state is a constant for gradients.
    replace(spec(final=True, make=make_stateful, has_exact_gradient=False,
                 shapes=((2, 5, 3), (1, 1, 2), (2, 20, 3)), **KERNELS,
                 wrong=(('state', cut(1), 'expects state of shape'),)), id='wkv with states'),
    replace(bi_spec('paper', make=make_slow, shapes=((2, 5, 3), (1, 2, 1), (3, 17, 4), (1, 50, 4)),
                    wrong=WRONG, **KERNELS), id=''),
    replace(bi_spec('official', make=make_official, has_exact_gradient=False,
                    shapes=((2, 9, 3), (1, 2, 3), (2, 3, 4), (1, 50, 4)), **KERNELS),
            id='bi_wkv as the official kernel')]
