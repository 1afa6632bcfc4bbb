"""A made-up family with every kind of case that tools/check_parity.py knows, and its files.

The official names and layouts differ from ours: ``enc`` is a convolution of one pixel, ``embed``
a linear layer.
"""

import json

import torch
from torch import nn

from vmamba_mm.families import Family
from vmamba_mm.families.parity import (
    Build,
    Call,
    Limit,
    Omission,
    Options,
    Parity,
    Probe,
    Subject,
)

NAMES = (('enc', 'embed'), ('bn', 'norm'), ('shift', 'shift'), ('spare', 'spare'),
         ('place', 'place'))


class Net(nn.Module):
    """(B, L, 4) and times (B,) to tokens (B, L, 6), and their mean."""

    def __init__(self, width=6, formula='exact'):
        super().__init__()
        self.formula = formula
        self.embed = nn.Linear(4, width)
        self.norm = nn.BatchNorm1d(width)
        self.shift = nn.Parameter(torch.randn(()))
        self.spare = nn.Parameter(torch.randn(2))
        self.place = nn.Parameter(torch.randn(width))
        self.drop = nn.Identity()

    def forward(self, x, times, mask=None):
        # Of a number that is added to all channels the layer norm keeps nothing.
        x = nn.functional.layer_norm(self.embed(x) + self.shift, (6,))
        tokens = self.norm(x.transpose(1, 2)).transpose(1, 2) + self.place
        tokens = self.drop(tokens) * (1 + times.to(tokens.dtype))[:, None, None]
        if self.formula == 'paper':
            tokens = tokens.square()
        if mask is not None:
            tokens = tokens * mask[..., None]
        return tokens, tokens.mean(1)

    def amplify(self, x, times, factor):
        return self(x, times)[1] * factor

    def loss(self, pair):
        return (pair[0] - self.embed.weight.sum() * pair[1]).square().mean()

    def load_pretrained(self, path, weights='model'):
        state = torch.load(path, weights_only=True)[weights]
        own = {}
        for name, value in state.items():
            first, _, rest = name.partition('.')
            name = '.'.join(filter(None, (dict(NAMES)[first], rest)))
            own[name] = value.flatten(1) if value.dim() == 4 else value
        self.load_state_dict(own)


def read_slowly(model, inputs):
    """A sequence in two parts, with a state between them."""
    x, length = inputs['input'], inputs['prefill_length']
    first, later = model.embed(x[:, :length]), model.embed(x[:, length:])
    return dict(output=torch.cat((first, later), 1),
                state=dict(last=first[:, -1], count=torch.tensor(length)))


class Projector(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(width, 3)

    def forward(self, x):
        return self.linear(x)


def decay(x, gain, power=1, exact=True):
    y = x * gain ** power
    return (y if exact else y + 1), y.sum(-1)


# --- the family ---------------------------------------------------------------------------------

def call_of(case: Options) -> Call:
    kind = case.get('kind')
    if kind == 'amplify':
        return Call(args=('input', 'times', 'factor'), method='amplify')
    if kind == 'slow':
        return Call(args=('input', 'prefill_length'), run='toy_parity:read_slowly')
    if kind == 'pair':
        return Call(method='loss', outputs=('losses',), view=lambda loss: [loss])
    return Call(args=('input', 'times'), kwargs={'mask': 'mask'}, outputs=('tokens', 'pooled'),
                probes={'features': Probe('drop'),
                        'inner': (Probe('embed'), Probe('norm', 'input', lambda x: x[:, ::2]))})


def subject(file: str, options: Options) -> Subject:
    kwargs = options['kwargs']
    if options['kind'] == 'projector':
        return Subject(
            Build('toy_parity:Projector', dict(width=kwargs['width'])), within=('model', 'part'),
            convert=lambda state: {f'linear.{k.removeprefix("0.")}': v for k, v in state.items()})
    kwargs.require('act', 'relu', 'none')
    kwargs.ignore('drop_path_rate', 'teacher')
    build = Build('toy_parity:Net', dict(width=kwargs['sizes']['width']))
    if options['kind'] == 'start':
        return Subject(build, loaded={'place': 'placed', 'embed.bias': options['source']},
                       has_cases=False)
    return Subject(build, call_of, load=dict(weights='ema'), initial='start',
                   variants={'paper': dict(formula='paper')})


def decay_of(section: str, case: Options) -> Subject:
    if section == 'layers':
        return Subject(Build('torch.nn:Linear', dict(in_features=case['width'], out_features=2)),
                       state='state_dict')
    return Subject(Build('toy_parity:decay', dict(power=case.get('power', 1))),
                   Call(args=('x',), kwargs={'gain': 'gain'}, outputs=('y', 'total'),
                        gradients={'grad_first': 'y'}),
                   variants={'shifted': dict(exact=False)})


PARITY = Parity(
    subject, ops={'op_decay.pt': decay_of},
    omissions=(Omission('seed', 'drew the masks'),
               Omission('draws', 'counts random numbers', case='* shifted')),
    absences=(Omission('grad_params', 'a case in train mode has none', case='* train'),
              Omission('start.expected.pt', 'it only loads')),
    limits=(Limit('features', 1e-3, 'its table is of fp16'),))

FAMILY = Family(name='toy', model='Toy', archs={}, rules={}, keys=NAMES,
                signature=('embed.weight',), infer_arch=dict, parity=PARITY)


# --- its files ----------------------------------------------------------------------------------

def official(named):
    """By official names, with the layout of a convolution."""
    back = {ours: theirs for theirs, ours in NAMES}
    renamed = {}
    for name, value in named.items():
        first, _, rest = name.partition('.')
        if name == 'embed.weight' and value is not None:
            value = value[:, :, None, None]
        renamed['.'.join(filter(None, (back[first], rest)))] = value
    return renamed


def gradients(model):
    return official({k: p.grad for k, p in model.named_parameters()})


def make_files() -> dict:
    """{name of a file: content} of a folder in which all agrees."""
    torch.manual_seed(0)
    rand = torch.randn
    net = Net().eval()
    with torch.no_grad():
        net.norm.running_mean.add_(rand(6))
    weights = official(net.state_dict())
    x, times, mask = rand(2, 5, 4).requires_grad_(), torch.tensor([1, 3]), rand(2, 5)
    mask.requires_grad_()
    embedded = []
    hook = net.norm.register_forward_pre_hook(lambda module, args: embedded.append(args[0]))
    tokens, pooled = net(x, times, mask)
    hook.remove()
    up = [rand(2, 5, 6), rand(2, 6)]
    torch.autograd.backward([tokens, pooled], up)
    grads = gradients(net)
    enc = grads.pop('enc.weight')
    plain, _ = net(x, torch.zeros(2))
    first = dict(input=x, times=times, mask=mask, tokens=tokens, pooled=pooled, seed=7,
                 features=plain, inner=[net.embed(x), embedded[0][:, ::2]],
                 grad_tokens=up[0], grad_pooled=up[1], grad_input=x.grad, grad_mask=mask.grad,
                 grad_params=grads, zero_grad_params=['shift'],
                 grad_params_strided={'enc.weight': dict(
                     step=[2, 3, 1, 1], value=enc[::2, ::3], sum_sq=enc.square().sum().item())})
    paper, leaves = _with(net, 'paper'), [t.detach().clone().requires_grad_() for t in (x, mask)]
    results = paper(leaves[0], times, leaves[1])
    torch.autograd.backward(results, up)
    first |= dict(tokens_paper=results[0], grad_input_paper=leaves[0].grad,
                  grad_mask_paper=leaves[1].grad, grad_params_paper=gradients(paper))

    trained = _with(net, 'exact').train()
    y = x.detach().clone().requires_grad_()
    after, _ = trained(y, times)
    after.backward(up[0])
    train = dict(mode='train (batch statistics)', input=x, times=times, tokens=after,
                 grad_tokens=up[0], grad_input=y.grad,
                 buffers_after=official(dict(trained.named_buffers())))
    amplified = dict(kind='amplify', input=x, times=times, factor=2.5,
                     output=net.amplify(x, times, 2.5))
    slow = dict(kind='slow', input=x, prefill_length=2, output=net.embed(x),
                state=dict(last=net.embed(x)[:, 1], count=torch.tensor(2)))
    pair = [rand(3).requires_grad_(), rand(3).requires_grad_()]
    net.zero_grad()
    loss = net.loss(pair)
    loss.backward()
    couple = dict(kind='pair', input=pair, losses=[loss],
                  grad_input=[t.grad for t in pair], grad_params=gradients(net))

    projector = Projector(4)
    z = rand(2, 4).requires_grad_()
    out = projector(z)
    up = rand(2, 3)
    out.backward(up)
    named = {f'0.{k.removeprefix("linear.")}': p for k, p in projector.named_parameters()}
    kwargs = dict(sizes=dict(width=6), act='relu', drop_path_rate=0.1, teacher=dict(width=9))
    return {
        'net.json': dict(kwargs=kwargs, kind='net', note='a note'),
        'net.pth': dict(model={k: v + 1 for k, v in weights.items()}, ema=weights),
        'net.expected.pt': dict(kwargs=kwargs, kind='net', start={'enc.bias': rand(6)},
                                cases=[first, train, amplified, slow, couple]),
        'start.json': dict(kwargs=kwargs, kind='start', source='enc.bias'),
        'start.pth': dict(model=weights, placed=weights['place']),
        'projector.json': dict(kwargs=dict(width=4), kind='projector'),
        'projector.pth': dict(model=dict(part=named)),
        'projector.expected.pt': dict(kwargs=dict(width=4), cases=[dict(
            input=z, output=out, grad_output=up, grad_input=z.grad,
            grad_params={k: p.grad for k, p in named.items()})]),
        'op_decay.pt': make_op()}


def _with(net, formula):
    other = Net(formula=formula).eval()
    other.load_state_dict(net.state_dict())
    return other


def make_op():
    leaves = [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in ((2, 3), (3,))]
    x, gain = leaves
    up = torch.randn(2, 3, dtype=torch.float64)
    y, total = decay(x, gain, 2)
    y.backward(up)
    flat = dict(x=x, gain=gain, power=2, y=y, total=total, grad_first=up,
                grads=dict(x=x.grad, gain=gain.grad), y_shifted=y + 1,
                shifted=dict(grads=dict(x=x.grad, gain=gain.grad), draws=3))
    nested = dict(inputs=dict(x=x, gain=gain), y=decay(x, gain)[0], note='no power')
    layer = nn.Linear(3, 2, dtype=torch.float64)
    z = x.detach().clone().requires_grad_()
    layer(z).backward(up[:, :2])
    layers = dict(width=3, state_dict=layer.state_dict(), input=z, output=layer(z),
                  grad_output=up[:, :2], grad_input=z.grad,
                  grad_params={k: p.grad for k, p in layer.named_parameters()})
    return dict(cases=[flat, nested], layers=layers, note='text is passed over')


def save_files(files: dict, folder) -> None:
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        if name.endswith('.json'):
            (folder / name).write_text(json.dumps(content))
        else:
            torch.save(copied(content), folder / name)


def copied(content):
    """A copy of nested content, without the tensors' graphs."""
    if isinstance(content, torch.Tensor):
        return content.detach().clone()
    if isinstance(content, dict):
        return {k: copied(v) for k, v in content.items()}
    return [copied(v) for v in content] if isinstance(content, list) else content
