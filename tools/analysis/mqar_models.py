"""The models of mqar.py, its two settings, and what a training of each costs."""

from typing import NamedTuple

from mixers import build, count_flops, state_numbers

from vmamba_mm.families.mamba_lm import OPTIONS

DATA_SEED = 123  # of Zoology's configs; the seed of a training is added


class Model(NamedTuple):
    label: str
    mixer: str  #: of mixers.MIXERS
    settings: dict  #: of CausalLM, beside width, depth and vocabulary


MODELS = {
    'attention': Model('softmax attention', 'attention', {}),
    'mamba-n16': Model('Mamba, N = 16', 'mamba', dict(d_state=16)),
    'mamba2-n16': Model('Mamba-2, N = 16', 'mamba2', dict(d_state=16)),
    'mamba2-n64': Model('Mamba-2, N = 64', 'mamba2', dict(d_state=64)),
    'mamba2-n256': Model('Mamba-2, N = 256', 'mamba2', dict(d_state=256)),
    'retnet': Model('RetNet', 'retnet', {}),
    'rwkv4': Model('RWKV-4', 'rwkv4', {}),
    'rwkv6': Model('RWKV-6', 'rwkv6', {}),
    'rwkv7': Model('RWKV-7', 'rwkv7', {}),
}
#: Those of --setting gpu; the others are asked for with --models.
_OF_STUDY = ['attention', 'mamba-n16', 'mamba2-n16', 'mamba2-n64', 'mamba2-n256']

#: What decides the result of a run, and after it which runs there are. Widths, weight decay, the
#: order of the data and the number of blocks are of Zoology and of Mamba-2's figure 8 (arXiv
#: 2405.21060), which trains much longer. To make up for that, there are examples with few pairs
#: too, and each segment has twice the pairs of the one before: what is learnt on one helps on the
#: next, and without these steps all models stay for long where they know which tokens are values,
#: and no more. Zeros stand between the queries, as in Zoology's figure 2, since random tokens take
#: much longer to learn. Heads of Mamba-2 are small, so that a narrow model has several
#: decays.
SETTINGS = {
    'gpu': dict(
        vocab_size=8192, length=256, pairs=[1, 2, 4, 8, 16, 32, 64], examples=16384,
        test_examples=1000, power_a=0.01, filler='zeros', epochs=10, batch_size=256, depth=2,
        head_dim=16, weight_decay=0.1, stop_at=0.99, evaluations=32, dtype='tf32',
        models=_OF_STUDY, widths=[32, 64, 128, 256], lrs=[3.2e-3, 1e-2], seeds=[0]),
    'cpu': dict(
        vocab_size=128, length=32, pairs=[1, 2, 4, 8], examples=9600, test_examples=500,
        power_a=0.01, filler='zeros', epochs=2, batch_size=64, depth=1, head_dim=8,
        weight_decay=0.1, stop_at=0.99, evaluations=12, dtype='fp32',
        models=['mamba2-n16', 'mamba2-n64'], widths=[32], lrs=[5e-3, 1e-2], seeds=[0])}
CHOICES = ('models', 'widths', 'lrs', 'seeds')  # of runs; all else is the same for all of them

#: To guess a time before anything was measured: multiply-adds a second, and seconds of a step that
#: computes nothing.
GUESSES = {'cuda': (40e12, 4e-3), 'cpu': (10e9, 5e-3)}


def settings_of(model, setting):
    """The keyword arguments of CausalLM for a model but for its width."""
    has_heads = 'head_dim' in OPTIONS[MODELS[model].mixer]
    head_dim = dict(head_dim=setting['head_dim']) if has_heads else {}
    return dict(MODELS[model].settings, **head_dim, vocab_size=setting['vocab_size'],
                depth=setting['depth'])


def build_model(model, d_model, setting):
    return build(MODELS[model].mixer, embed_dims=d_model, **settings_of(model, setting))


class Cost(NamedTuple):
    parameters: int
    state: int  #: numbers that all layers keep of the L tokens of a sequence
    flops: int  #: multiply-adds of a step, forward and backward


def cost_of(model, d_model, setting):
    import torch

    mixer, length = MODELS[model].mixer, setting['length']
    settings = dict(settings_of(model, setting), embed_dims=d_model)
    with torch.device('meta'):
        built = build(mixer, **settings)
    logits = built.lm_head.weight.numel()  # multiply-adds of the logits of a token
    queries = sum(setting['pairs']) / len(setting['pairs'])
    forward = count_flops(mixer, length, **settings) + (queries - length) * logits
    return Cost(sum(p.numel() for p in built.parameters()),
                state_numbers(mixer, length, **settings), int(3 * forward * setting['batch_size']))


def guess_seconds(cost, device_type):
    """Of one step, before anything was measured."""
    rate, least = GUESSES[device_type]
    return least + cost.flops / rate


class Clock:
    """How long runs take: as measured, else by FLOPs from the measured ones, else as guessed.

    Args:
        costs: {(model, width): Cost}.
    """

    def __init__(self, costs, device_type):
        self.costs, self.device_type, self.measured = costs, device_type, {}

    def measure(self, run, seconds, steps):
        if steps:
            self.measured[run.model, run.d_model] = seconds / steps

    def step_seconds(self, run):
        key = run.model, run.d_model
        if key in self.measured:
            return self.measured[key]
        if not self.measured:
            return guess_seconds(self.costs[key], self.device_type)
        flops = self.costs[key].flops
        nearest = min(self.measured, key=lambda k: abs(self.costs[k].flops - flops))
        return self.measured[nearest] * flops / self.costs[nearest].flops
