"""Cases of the official code, run on our models: the engine of check_parity.py."""

import contextlib
import copy
import functools
import inspect
import math
import pkgutil
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from _cli import UserError
from torch import Tensor, nn

from vmamba_mm.checkpoints.files import read_checkpoint
from vmamba_mm.checkpoints.formats import read_content
from vmamba_mm.checkpoints.names import differences
from vmamba_mm.families import Family
from vmamba_mm.families.names import has_row, rename, rows_of
from vmamba_mm.families.parity import Build, Call, Options, Parity, Probe, Subject

DTYPES = dict(fp64=torch.float64, fp32=torch.float32, fp16=torch.float16, bf16=torch.bfloat16)
#: (outputs, gradients) by device and dtype
LIMITS = {
    ('cpu', 'fp64'): (1e-10, 1e-10), ('cuda', 'fp64'): (1e-10, 1e-10),
    # The official numbers are of fp32 on a CPU, where the same sums leave a few rounding errors.
    ('cpu', 'fp32'): (1e-5, 1e-4),
    # Fused kernels sum in another order, and their exponentials are hardware's.
    ('cuda', 'fp32'): (1e-4, 1e-3),
    # 11 bits, and 8, of each number; a gradient has gone through the model twice.
    ('cpu', 'fp16'): (5e-3, 5e-2), ('cuda', 'fp16'): (5e-3, 5e-2),
    ('cpu', 'bf16'): (5e-2, 3e-1), ('cuda', 'bf16'): (5e-2, 3e-1)}
#: keys of a case that describe it, or that another key explains
DESCRIPTIONS = {'note', 'name', 'mode', 'zero_grad_params'}
#: gradients of several things at once
GRADIENTS = ('grads', 'grad_params', 'grad_params_strided')
#: what wrong files and arguments raise
ERRORS = (RuntimeError, ValueError, KeyError, TypeError, AttributeError, OSError, ImportError)


class Row(NamedTuple):
    """One comparison; ``problem`` in place of an error where there was none to make.

    ``reason`` is of an omission, if there is neither an error nor a problem, or of the limit.
    """

    file: str
    case: str
    tensor: str
    error: float | None = None
    limit: float | None = None
    problem: str = ''
    reason: str = ''

    @property
    def is_omitted(self) -> bool:
        return self.error is None and not self.problem

    @property
    def failed(self) -> bool:
        # NaN fails.
        return bool(self.problem) or self.error is not None and not self.error <= self.limit

    @property
    def excess(self) -> float:
        """How near the error is to the limit, above 1 for a failure."""
        if self.error is None:
            return math.inf if self.problem else -1.0
        if math.isnan(self.error):
            return math.inf
        return self.error / self.limit if self.limit else math.inf if self.error else 0.0


class Report:
    """Collects the rows of one file.

    Args:
        file: its name.
        parity: of the family, for omissions and limits.
        device: 'cpu' or 'cuda'.
        dtype: a key of ``DTYPES``.
    """

    def __init__(self, file: str, parity: Parity, device: str, dtype: str):
        self.file, self.parity, self.rows = file, parity, []
        self.usual = LIMITS[torch.device(device).type, dtype]
        self.is_exact = device == 'cpu' and dtype in ('fp32', 'fp64')

    def fail(self, case: str, tensor: str, problem: str) -> None:
        self.rows.append(Row(self.file, case, tensor, problem=problem))

    def lack(self, case: str, tensor: str, problem: str) -> None:
        """A failure, unless the family says why the file does not hold this."""
        if not self._excuse(self.parity.absences, case, tensor):
            self.fail(case, tensor, problem)

    def omits(self, case: str, tensor: str) -> bool:
        """Whether the family says why this is not compared; then there is a row with the reason."""
        return self._excuse(self.parity.omissions, case, tensor)

    def _excuse(self, omissions, case, tensor):
        for omission in omissions:
            if omission.holds(self.file, case, tensor):
                self.rows.append(Row(self.file, case, tensor, reason=omission.reason))
                return True
        return False

    @contextlib.contextmanager
    def catch(self, case: str, tensor: str) -> Iterator[None]:
        """What raises is a failure: a checkpoint that does not fit, arguments of no model."""
        try:
            yield
        except ERRORS as err:
            text = ' '.join(str(err).split())
            kind = '' if isinstance(err, UserError) else f'{type(err).__name__}: '
            self.fail(case, tensor, f'{kind}{text}')

    def limit(self, case: str, tensor: str) -> tuple[float, str]:
        usual = self.usual[tensor.startswith('grad')]
        for limit in self.parity.limits:
            if limit.holds(self.file, case, tensor):
                return limit.error if self.is_exact else max(limit.error, usual), limit.reason
        return usual, ''

    def compare(self, case: str, tensor: str, ours: Any, expected: Any,
                scale: float | None = None) -> None:
        """Tensors by relative 2-norm, in whatever lists and dicts they are, all else exactly.

        Args:
            scale: what the error of a tensor that is zero is relative to.
        """
        if self.omits(case, tensor):
            return
        if isinstance(expected, Mapping):
            for key, value in expected.items():
                self.compare(case, f'{tensor}.{key}', _item(ours, key), value, scale)
        elif isinstance(expected, list | tuple) and any(map(_holds_tensors, expected)):
            if not isinstance(ours, list | tuple) or len(ours) != len(expected):
                count = len(ours) if isinstance(ours, list | tuple) else type(ours).__name__
                self.fail(case, tensor, f'{len(expected)} are expected, ours: {count}')
                return
            for i, pair in enumerate(zip(ours, expected, strict=True)):
                self.compare(case, f'{tensor}.{i}', *pair, scale)
        elif ours is None and expected is not None:
            self.fail(case, tensor, 'ours has none')
        elif isinstance(expected, Tensor | float | int) and not isinstance(expected, bool):
            self._compare_numbers(case, tensor, torch.as_tensor(ours), torch.as_tensor(expected),
                                  scale)
        elif _plain(ours) != _plain(expected):
            self.fail(case, tensor, f'is {_plain(ours)!r:.60}, expected {_plain(expected)!r:.60}')
        else:
            self.rows.append(Row(self.file, case, tensor, 0.0, 0.0))

    def _compare_numbers(self, case, tensor, ours, expected, scale):
        if ours.shape != expected.shape:
            self.fail(case, tensor, f'is {tuple(ours.shape)}, expected {tuple(expected.shape)}')
        elif not expected.is_floating_point():
            wrong = (ours.cpu() != expected).double().mean().item() if expected.numel() else 0.0
            self.rows.append(Row(self.file, case, tensor, wrong, 0.0))
        else:
            ours, expected = ours.detach().double().cpu(), expected.double()
            norm = scale or expected.norm().item() or 1e-30
            error = (ours - expected).norm().item() / norm
            limit, reason = self.limit(case, tensor)
            self.rows.append(Row(self.file, case, tensor, error, limit, reason=reason))


def _item(value, key):
    return value.get(key) if isinstance(value, Mapping) else None


def _holds_tensors(value):
    if isinstance(value, list | tuple):
        return any(map(_holds_tensors, value))
    return isinstance(value, Tensor | Mapping)


def _plain(value):
    """Tensors and tuples as lists."""
    if isinstance(value, Tensor):
        return value.tolist()
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


# --- what is built and loaded ---------------------------------------------------------------------

def build(spec: Build) -> Any:
    """A module, or a function with its keyword arguments."""
    target = pkgutil.resolve_name(spec.target)
    kwargs = {k: build(v) if isinstance(v, Build) else v for k, v in spec.kwargs.items()}
    return target(**kwargs) if inspect.isclass(target) else functools.partial(target, **kwargs)


def load(model: nn.Module, subject: Subject, path: Path) -> None:
    """Load a checkpoint as users do, strictly.

    Raises:
        UserError: if it does not fit.
    """
    if subject.convert is not None:
        content = read_content(path)
        for key in subject.within:
            if not isinstance(content, Mapping) or key not in content:
                raise UserError(f'{path.name} holds nothing under {".".join(subject.within)}')
            content = content[key]
        load_state(model, subject.convert(content), path.name)
    elif hasattr(model, 'load_pretrained'):
        model.load_pretrained(str(path), **subject.load)
    else:
        checkpoint = read_checkpoint(path, **subject.load)
        load_state(model, checkpoint.get('state_dict', checkpoint), path.name)


def load_state(model: nn.Module, state: Mapping[str, Tensor], name: str) -> None:
    wrong = differences(model.state_dict(), state)
    if wrong:
        shown = '; '.join(f'{k} {v}' for k, v in list(wrong.items())[:3])
        raise UserError(f'{name} does not fit the model: {shown}'
                        + (f'; {len(wrong) - 3} more' if len(wrong) > 3 else ''))
    model.load_state_dict(state)


class OfficialNames:
    """Our parameters and buffers in the official layout.

    Each element of the official weights gets a number, the numbers go through the conversion that
    loads the weights, and come to lie where our elements are.

    Args:
        model: ours.
        convert: (weights by official names, our model's own) -> by our names.
        shapes: of the official weights.
    """

    def __init__(self, model: nn.Module, convert: Callable, shapes: Mapping[str, tuple[int, ...]]):
        self.shapes = shapes
        self.start, numbers, total = {}, {}, 0
        for name, shape in shapes.items():
            count = math.prod(shape)
            numbers[name] = torch.arange(total, total + count, dtype=torch.float64).view(shape)
            self.start[name], total = total, total + count
        self.total = total
        own = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
        converted = convert(numbers, own) if numbers else {}
        self.numbers = {k: v.long().flatten() for k, v in converted.items()}
        covered = {id(own[k]) for k in self.numbers if k in own}
        #: names of our trained parameters that no official weight belongs to
        self.left = [k for k, p in model.named_parameters()
                     if p.requires_grad and id(p) not in covered]

    def arrange(self, values: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
        """By official names; None where ours has none of some of a weight's elements."""
        flat = torch.zeros(self.total, dtype=torch.float64)
        is_set = torch.zeros(self.total, dtype=torch.bool)
        for key, numbers in self.numbers.items():
            value = values.get(key)
            if value is not None and value.numel() == numbers.numel():
                flat[numbers] = value.detach().double().cpu().flatten()
                is_set[numbers] = True
        arranged = {}
        for name, shape in self.shapes.items():
            part = slice(self.start[name], self.start[name] + math.prod(shape))
            arranged[name] = flat[part].view(shape) if is_set[part].all() else None
        return arranged


def convert_names(family: Family, subject: Subject, state: Mapping[str, Any],
                  own: Collection[str]) -> dict[str, Any]:
    """Official weights, or gradients, by our names: by the subject's way, or by the family's rows.

    Args:
        own: names of our model, whose backbone may lie at ``backbone.`` or be all of it.
    """
    if subject.convert is not None:
        return dict(subject.convert(state))
    plain = {k.removeprefix('backbone.'): v for k, v in state.items()}
    rows = rows_of(family, plain) + tuple(family.head_keys)
    renamed = {}
    for name, value in plain.items():
        ours = rename(name, rows) if has_row(name, rows) else name
        if ours is not None:
            renamed[f'backbone.{ours}' if f'backbone.{ours}' in own else ours] = value
    return renamed


def official_shapes(cases: list[Mapping], checkpoint: Mapping) -> dict[str, tuple[int, ...]]:
    """Shapes of all weights that the cases name; those of gradients in part are in the file."""
    shapes = {}
    for case in cases:
        named = [*GRADIENTS[1:], 'buffers_after',
                 *(key for key in case if key.startswith('grad_params_'))]
        for name, value in ((n, v) for key in named for n, v in (case.get(key) or {}).items()):
            if isinstance(value, Tensor):
                shapes[name] = tuple(value.shape)
            else:
                shapes.setdefault(name, _shape_in(checkpoint, name))
    return shapes


def _shape_in(content, name):
    """The shape of a tensor of this name, whatever lies before it, in a file of any structure."""
    for key, value in content.items():
        if isinstance(value, Tensor) and (key == name or str(key).endswith(f'.{name}')):
            return tuple(value.shape)
        if isinstance(value, Mapping) and (shape := _shape_in(value, name)) is not None:
            return shape
    return None


# --- a case ---------------------------------------------------------------------------------------

class CaseRun:
    """One case on one model or function.

    Args:
        report: for the rows.
        label: of the case.
        case: what the file holds.
        target: the model, in the dtype and on the device of the run, or a function.
        call: how it is called.
        names: of a model's parameters; None for a function.
        device, dtype: of the inputs.
    """

    def __init__(self, report: Report, label: str, case: Mapping[str, Any], target: Any, call: Call,
                 names: OfficialNames | None, device: str, dtype: torch.dtype):
        self.report, self.label, self.case, self.call = report, label, case, call
        self.target, self.names = target, names
        keys = [k for k in (*call.args, *call.kwargs) if k in case]
        self.inputs = {k: _move(case[k], device, None if k in call.uncast else dtype)
                       for k in keys}
        self.used = set(keys) | DESCRIPTIONS

    def run(self) -> set[str]:
        """Compare all that the case holds; the keys that were dealt with."""
        missing = [k for k in self.call.args if k not in self.case]
        for key in missing:
            self.report.fail(self.label, key, 'is missing from the case')
        stored = self._stored_gradients()
        with self.report.catch(self.label, 'model'), torch.set_grad_enabled(bool(stored)):
            if missing:
                return self.used
            results = self._results()
            if not any(key in self.case for key in results):
                self.report.lack(self.label, self.call.outputs[0], 'is missing from the case')
            for key, value in results.items():
                if key in self.case:
                    self.used.add(key)
                    self.report.compare(self.label, key, value, self.case[key])
            if 'buffers_after' in self.case:
                self._compare_buffers()
            if stored - set(results):
                self._compare_gradients(results)
        return self.used

    def _stored_gradients(self):
        return {k for k in self.case
                if k.startswith('grad_') or k in ('grads', 'gy') or k in self.call.gradients}

    def _results(self):
        call = self.call
        if call.run is not None:
            run = pkgutil.resolve_name(call.run) if isinstance(call.run, str) else call.run
            return dict(run(self.target, self.inputs))
        read, hooks = {}, []
        try:
            for name, probes in call.probes.items():
                several = isinstance(probes, tuple)
                for probe in probes if several else (probes,):
                    values = read.setdefault(name, [])
                    hooks.append(_watch(self.target.get_submodule(probe.path), probe, values))
            function = getattr(self.target, call.method) if call.method else self.target
            returned = function(*(self.inputs[k] for k in call.args),
                                **{word: self.inputs[k] for k, word in call.kwargs.items()
                                   if k in self.inputs})
        finally:
            for hook in hooks:
                hook.remove()
        if isinstance(returned, Mapping):
            results = dict(returned)
        else:
            results = dict(zip(call.outputs, returned if len(call.outputs) > 1 else (returned,),
                               strict=False))
        for name, values in read.items():
            single = not isinstance(call.probes[name], tuple)
            results[name] = (values[-1] if values else None) if single else values
        return results

    def _compare_buffers(self):
        self.used.add('buffers_after')
        ours = self.names.arrange(dict(self.target.named_buffers()))
        for name, expected in self.case['buffers_after'].items():
            value = ours[name]
            if value is not None and not expected.is_floating_point():
                value = value.to(expected.dtype)
            self.report.compare(self.label, f'buffers_after.{name}', value, expected)

    def _owner(self, key):
        """The input or output that a gradient belongs to."""
        return self.call.gradients.get(key) or ('y' if key == 'gy' else key.removeprefix('grad_'))

    def _compare_gradients(self, results):
        roots, upstream, by_input = [], [], {}
        for key in sorted(self._stored_gradients() - set(GRADIENTS) - set(results)):
            owner = self._owner(key)
            if owner in results:
                self.used.add(key)
                pairs = [(r, g) for r, g in zip(_leaves(results[owner]), _leaves(self.case[key]),
                                                strict=True) if g is not None]
                roots += [r for r, _ in pairs]
                upstream += [g.to(r) for r, g in pairs]
            elif owner in self.inputs:
                by_input[owner] = key
        if not roots:
            loss = results.get(self.call.outputs[0])
            if not isinstance(loss, Tensor) or loss.numel() != 1:
                self.report.lack(self.label, f'grad_{self.call.outputs[0]}',
                                 'is missing from the case')
                return
            roots, upstream = [loss], [torch.ones_like(loss)]
        if self.names is not None:
            self.target.zero_grad()
        torch.autograd.backward(roots, upstream)
        self._compare_input_gradients(by_input)
        if self.names is not None:
            self._compare_parameter_gradients()

    def _compare_input_gradients(self, by_input):
        grads = self.case.get('grads')
        if grads is not None:
            self.used.add('grads')
            for name in sorted(set(grads) - set(self.inputs)):
                if not self.report.omits(self.label, f'grads.{name}'):
                    self.report.fail(self.label, f'grads.{name}', 'belongs to no input')
        for name, value in self.inputs.items():
            leaves = [t for t in _leaves(value) if isinstance(t, Tensor) and t.requires_grad]
            if name in by_input:
                key, expected = by_input[name], self.case[by_input[name]]
                self.used.add(key)
            elif grads is not None and name in grads:
                key, expected = f'grads.{name}', grads[name]
            elif leaves:
                key = f'grad_{name}' if grads is None else f'grads.{name}'
                self.report.lack(self.label, key, 'is missing from the case')
                continue
            else:
                continue
            ours = [None if t is None else t.grad for t in _leaves(value)]
            self.report.compare(self.label, key,
                                ours if isinstance(value, list | tuple) else ours[0], expected)

    def _compare_parameter_gradients(self):
        case, label, report = self.case, self.label, self.report
        full, strided = (case.get(key) or {} for key in GRADIENTS[1:])
        self.used.update(key for key in GRADIENTS[1:] if key in case)
        trained = any(p.requires_grad for p in self.target.parameters())
        if trained and not full and not strided:
            report.lack(label, 'grad_params', 'is missing from the case')
            return
        ours = self.names.arrange({k: p.grad for k, p in self.target.named_parameters(
            remove_duplicate=False)})
        norms = [g.double().norm().item() for g in full.values() if g is not None]
        scale = max(norms, default=0.0) or 1.0
        zero = set(case.get('zero_grad_params') or ())
        for name, expected in full.items():
            tensor, value = f'grad_params.{name}', ours.get(name)
            if expected is None:  # the official graph does not reach it
                count = 0.0 if value is None else value.norm().item()
                report.compare(label, tensor, torch.tensor(count), torch.tensor(0.0), scale)
            else:
                small = name in zero or not expected.any()
                report.compare(label, tensor, value, expected, scale if small else None)
        for name, part in strided.items():
            tensor, value = f'grad_params_strided.{name}', ours.get(name)
            steps = tuple(slice(None, None, step) for step in part['step'])
            report.compare(label, tensor, None if value is None else value[steps], part['value'])
            if value is not None:
                report.compare(label, f'{tensor}.sum_sq', value.square().sum(),
                               torch.tensor(part['sum_sq'], dtype=torch.float64))
        stored = set(full) | set(strided)
        for name in [k for k in self.names.left] + sorted(
                k for k, v in ours.items() if v is not None and k not in stored):
            report.lack(label, f'grad_params.{name}', 'the case has none to compare with')


def _watch(module: nn.Module, probe: Probe, values: list) -> Any:
    def keep(value):
        values.append(value if probe.view is None else probe.view(value))

    if probe.side == 'input':
        return module.register_forward_pre_hook(lambda module, args: keep(args[0]))
    return module.register_forward_hook(lambda module, args, output: keep(output))


def _move(value, device, dtype):
    if isinstance(value, Tensor):
        if value.is_floating_point():
            return value.to(device, dtype or value.dtype, copy=True).requires_grad_()
        return value.to(device)
    if isinstance(value, list | tuple):
        return type(value)(_move(v, device, dtype) for v in value)
    if isinstance(value, Mapping):
        return {k: _move(v, device, dtype) for k, v in value.items()}
    return value


def _leaves(value):
    if isinstance(value, list | tuple):
        return [leaf for v in value for leaf in _leaves(v)]
    if isinstance(value, Mapping):
        return [leaf for v in value.values() for leaf in _leaves(v)]
    return [value]


# --- a file ---------------------------------------------------------------------------------------

def label_of(number: int, case: Mapping[str, Any]) -> str:
    word = next((case[k] for k in ('name', 'kind', 'mode') if isinstance(case.get(k), str)), '')
    return f'{number} {word.split()[0]}' if word.split() else str(number)


class Runner:
    """Runs the cases of the files of one family.

    Args:
        family: one with a ``parity``.
        device: 'cpu', 'cuda', ...
        dtype, dtype_of_ops: keys of ``DTYPES``.
    """

    def __init__(self, family: Family, device: str, dtype: str, dtype_of_ops: str):
        self.family, self.parity, self.device = family, family.parity, device
        self.dtype, self.dtype_of_ops = dtype, dtype_of_ops

    def check_model(self, path: Path, given: Mapping[str, Any],
                    expected: Mapping[str, Any]) -> list[Row]:
        """The rows of a checkpoint and its cases.

        Args:
            given: what is in NAME.json.
            expected: what is in NAME.expected.pt.
        """
        report = Report(path.name, self.parity, self.device, self.dtype)
        outside = {k: v for k, v in expected.items() if k not in ('cases', 'note')}
        options = Options({**outside, **{k: v for k, v in given.items() if k != 'note'}})
        with report.catch('', 'model'):
            subject = self.parity.subject(path.name, options)
            self._check_cases(report, path, subject, expected)
            compared = {subject.initial, *subject.loaded.values()}
            for key in [k for k in outside if k not in options and k not in compared]:
                if not report.omits('', key):
                    report.fail('', key, 'is not compared: unknown')
            for key in options.unread():
                report.fail('', key, 'is an option that the family does not know')
        return report.rows

    def _check_cases(self, report, path, subject, expected):
        cases = expected.get('cases') or []
        if subject.has_cases and not cases:
            report.lack('', 'cases', 'there are none')
        content = read_content(path)
        shapes = official_shapes(cases, content)
        for name in [n for n, shape in shapes.items() if shape is None]:
            report.fail('', f'grad_params.{name}', 'the checkpoint has no such weight')
        shapes = {n: shape for n, shape in shapes.items() if shape is not None}
        convert = functools.partial(convert_names, self.family, subject)
        models = {}
        for variant in ('', *subject.variants):
            spec = Build(subject.build.target,
                         {**subject.build.kwargs, **subject.variants.get(variant, {})})
            model = build(spec)
            if subject.initial:
                own = model.state_dict()
                model.load_state_dict(convert(expected[subject.initial], own), strict=False)
            load(model, subject, path)
            if not variant:
                self._check_loaded(report, model, subject, {**content, **expected})
            models[variant] = model.to(self.device, DTYPES[self.dtype]).eval()
        names = {variant: OfficialNames(model, convert, shapes)
                 for variant, model in models.items()}
        for number, case in enumerate(cases):
            self.check_case(report, label_of(number, case), case, subject, models, names,
                            DTYPES[self.dtype])
        if cases and not any(k.startswith('grad_params') for case in cases for k in case):
            report.lack('', 'gradients', 'no case has any')

    @staticmethod
    def _check_loaded(report, model, subject, tensors):
        state = model.state_dict()
        for name, key in subject.loaded.items():
            value = tensors.get(key)
            if value is None:
                value = _find_tensor(tensors, key)
            if value is None:
                report.fail('', key, 'is missing from the file')
            else:
                report.compare('', name, state.get(name), value)

    def check_case(self, report: Report, label: str, case: Mapping[str, Any], subject: Subject,
                   models: Mapping[str, Any], names: Mapping[str, OfficialNames | None],
                   dtype: torch.dtype) -> None:
        """Run a case on the model of each variant that it has numbers of."""
        options = Options({k: v for k, v in case.items() if isinstance(k, str)})
        call = subject.call if isinstance(subject.call, Call) else subject.call(options)
        case = {**{k: v for k, v in case.items() if k != 'inputs'}, **case.get('inputs', {})}
        used = {key for key in options if key not in options.unread()} | {'inputs'}
        case = {k: v for k, v in case.items() if not report.omits(label, str(k))}
        parts = {}
        for variant in subject.variants:
            own = {k.removesuffix(f'_{variant}'): k for k in case if k.endswith(f'_{variant}')}
            part = {k: case[old] for k, old in own.items()} | dict(case.get(variant) or {})
            if part:
                used.update({*own.values(), variant})
                shared = {*call.args, *call.kwargs, *(f'grad_{k}' for k in call.outputs), 'gy'}
                parts[variant] = {k: case[k] for k in shared if k in case} | part
        base = {k: v for k, v in case.items() if k not in used}
        if not parts or any(key in base for key in call.outputs):
            parts[''] = base
        for variant, part in parts.items():
            model = models[variant]
            if str(case.get('mode', '')).startswith('train'):
                model = copy.deepcopy(model).train()  # its buffers change
            handled = CaseRun(report, f'{label} {variant}'.strip(), part, model, call,
                              names[variant], self.device, dtype).run()
            for key in sorted(map(str, set(part) - handled)):
                report.fail(f'{label} {variant}'.strip(), key, 'is not compared: unknown')
        if '' not in parts:
            for key in sorted(map(str, set(base) - set().union(*parts.values()))):
                report.fail(label, key, 'is not compared: unknown')

    def check_op(self, path: Path) -> list[Row]:
        """The rows of a file of op or layer cases."""
        report = Report(path.name, self.parity, self.device, self.dtype_of_ops)
        function = self.parity.ops.get(path.name)
        if function is None:
            if not report.omits('', path.name):
                report.fail('', path.name, 'the family knows no op or layer for it')
            return report.rows
        with report.catch('', path.name):
            cases = list(_sections(torch.load(path, weights_only=True)))
            if not cases:
                report.lack('', 'cases', 'there are none')
            for section, number, case in cases:
                label = ' '.join(filter(None, (section, label_of(number, case))))
                with report.catch(label, 'model'):
                    self._check_op_case(report, label, section, case, function)
            if cases and not any(k in GRADIENTS for _, _, case in cases for k in case):
                report.lack('', 'gradients', 'no case has any')
        return report.rows

    def _check_op_case(self, report, label, section, case, function):
        options = Options({k: v for k, v in case.items() if isinstance(k, str)})
        subject = function(section, options)
        dtype = DTYPES[self.dtype_of_ops]
        models, names = {}, {}
        for variant in ('', *subject.variants):
            model = build(Build(subject.build.target, {
                **subject.build.kwargs, **subject.variants.get(variant, {})}))
            names[variant] = None
            if isinstance(model, nn.Module):
                if subject.state:
                    state = case[subject.state]
                    load_state(model, subject.convert(state) if subject.convert else state,
                               subject.state)
                model = model.to(self.device, dtype).eval()
                shapes = official_shapes([case], case.get(subject.state, {}))
                names[variant] = OfficialNames(
                    model, lambda state, own: (subject.convert or dict)(state), shapes)
            models[variant] = model
        read = {k for k in options if k not in options.unread()} | {subject.state}
        self.check_case(report, label, {k: v for k, v in case.items() if k not in read}, subject,
                        models, names, dtype)


def _find_tensor(content, key):
    for value in content.values():
        if isinstance(value, Mapping):
            found = value.get(key) if isinstance(value.get(key), Tensor) else _find_tensor(value, key)
            if found is not None:
                return found
    return None


def _sections(content: Any) -> Iterator[tuple[str, int, Mapping[str, Any]]]:
    """(name, number, case) of a list of cases, of a single one, or of several named parts."""
    if isinstance(content, list):
        content = {'cases': content}
    if any(isinstance(v, Tensor) for v in content.values()):
        yield '', 0, content
        return
    for name, part in content.items():
        section = '' if name == 'cases' else str(name)
        if isinstance(part, list) and part and isinstance(part[0], Mapping):
            for number, case in enumerate(part):
                yield section, number, case
        elif isinstance(part, Mapping):
            yield section, 0, part
