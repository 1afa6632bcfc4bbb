"""The files of a family, run on its models and ops."""

import copy
import functools
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from _parity.case import GRADIENTS, CaseRun
from _parity.report import Report, Row
from _parity.weights import (
    OfficialNames,
    build,
    convert_names,
    family_in,
    find_tensor,
    load,
    load_state,
    official_shapes,
)
from vmamba_mm.checkpoints.formats import read_content
from vmamba_mm.errors import UserError
from vmamba_mm.families import Family
from vmamba_mm.families.parity import Build, Call, Options, Parity, Subject
from vmamba_mm.ops.core import backends

#: Runs of plain PyTorch, whose largest error counts: where one rounding decides, as in a norm of
#: four channels, that of a single run is by chance.
ROUNDINGS = 16
DTYPES = dict(fp64=torch.float64, fp32=torch.float32, fp16=torch.float16, bf16=torch.bfloat16)


def read_numbers(path: Path) -> Any:
    """Read the content of a file of expected numbers.

    Raises:
        UserError: if it is no file of tensors and plain values.
    """
    try:
        return torch.load(path, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as err:
        raise UserError(f'cannot be read: {str(err).splitlines()[0]}') from err


class Runner:
    """Runs the cases of the files of one family.

    Args:
        family: whose names and loader apply.
        parity: of the files' folder.
        device: 'cpu', 'cuda', ...
        dtype, dtype_of_ops: keys of ``DTYPES``.
    """

    def __init__(self, family: Family, parity: Parity, device: str, dtype: str,
                 dtype_of_ops: str):
        self.family, self.parity, self.device = family, parity, device
        self.dtype, self.dtype_of_ops = dtype, dtype_of_ops

    # --- models -------------------------------------------------------------------------------

    def check_model(self, path: Path, arguments: Mapping[str, Any],
                    expected: Mapping[str, Any]) -> list[Row]:
        """The rows of a checkpoint and its cases.

        Args:
            arguments: the content of NAME.json.
            expected: the content of NAME.expected.pt.
        """
        report = Report(path.name, self.parity, self.device, self.dtype)
        outside = {k: v for k, v in {**expected, **arguments}.items() if k not in ('cases', 'note')}
        options = Options(outside)
        with report.catch('', 'model'):
            subject = self.parity.subject(path.name, options)
            self._check_cases(report, path, subject, expected)
            known = {*options, subject.initial, *subject.loaded.values()}
            for key in sorted(set(outside) - known):
                if not report.omits('', key):
                    report.fail('', key, 'is not compared: unknown')
            for key in options.unread():
                report.fail('', key, 'is an option that the family does not know')
        return report.rows

    def _check_cases(self, report, path, subject, expected):
        cases, content = expected.get('cases') or [], read_content(path)
        if subject.has_cases and not cases:
            report.lack('', 'cases', 'there are none')
        shapes = official_shapes(cases, content)
        for name in [name for name, shape in shapes.items() if shape is None]:
            report.fail('', name, 'the checkpoint has no such weight')
            del shapes[name]
        models, names = {}, {}
        for variant, spec in _variants(subject):
            model = build(spec)
            family = family_in(model) or self.family
            convert = functools.partial(convert_names, family, subject)
            if subject.initial:
                state = convert(expected[subject.initial], model.state_dict())
                model.load_state_dict(state, strict=False)
            load(model, family, subject, path)
            models[variant] = model.to(self.device, DTYPES[self.dtype]).eval()
            names[variant] = OfficialNames(model, convert, shapes)
        state = models[''].state_dict()
        for name, key in subject.loaded.items():
            report.compare('', name, state.get(name), find_tensor([expected, content], key))
        for number, case in enumerate(cases):
            self._check_case(report, _label(number, case), case, subject, models, names,
                             DTYPES[self.dtype])
        if cases and not any(k.startswith('grad_params') for case in cases for k in case):
            report.lack('', 'gradients', 'no case has any')

    # --- ops and layers -----------------------------------------------------------------------

    def check_op(self, path: Path) -> list[Row]:
        """The rows of a file of op or layer cases."""
        report = Report(path.name, self.parity, self.device, self.dtype_of_ops)
        function = self.parity.ops.get(path.name)
        if function is None:
            if not report.omits('', path.name):
                report.fail('', path.name, 'the family knows no op or layer for it')
            return report.rows
        with report.catch('', path.name):
            cases = list(_sections(read_numbers(path)))
            for section, number, case in cases:
                label = ' '.join(filter(None, (section, _label(number, case))))
                with report.catch(label, 'model'):
                    self._check_op_case(report, label, section, case, function)
            # In a case, or in what it has for a variant.
            parts = [part for _, _, case in cases for part in (case, *case.values())
                     if isinstance(part, Mapping)]
            if not any(key in GRADIENTS for part in parts for key in _keys(part)):
                report.lack('', 'gradients', 'no case has any')
        return report.rows

    def _check_op_case(self, report, label, section, case, function):
        options = Options(_named(case))
        subject = function(section, options)
        state = case[subject.state] if subject.state else {}
        convert = subject.convert or dict
        models, names = {}, {}
        for variant, spec in _variants(subject):
            model, names[variant] = build(spec, case), None
            if isinstance(model, nn.Module):
                model = model.to(self.device, DTYPES[self.dtype_of_ops]).eval()
                if subject.state:
                    load_state(model, convert(state), subject.state)
                names[variant] = OfficialNames(model, lambda state, tensors: convert(state),
                                               official_shapes([case], state))
            models[variant] = model
        read = {subject.state, *options} - set(options.unread())
        self._check_case(report, label, case, subject, models, names,
                         DTYPES[self.dtype_of_ops], read)

    # --- cases --------------------------------------------------------------------------------

    def _check_case(self, report, label, case, subject, models, names, dtype, read=frozenset()):
        """Run a case on the model of each variant that it has numbers of.

        Args:
            models, names: by variant, '' among them.
            read: options of the case that the subject was made of.
        """
        options = Options(_named(case))
        call = subject.call if isinstance(subject.call, Call) else subject.call(options)
        read = read | {key for key in options if key not in options.unread()}
        if isinstance(case.get('inputs'), Mapping):
            case = {**{k: v for k, v in case.items() if k != 'inputs'}, **case['inputs']}
        inputs = {*call.args, *call.kwargs}
        case = {k: v for k, v in case.items()
                if (k in inputs or k not in read) and not report.omits(label, str(k))}
        cases = {'': dict(case)}
        for variant in subject.variants:
            variant_case = {key.removesuffix(f'_{variant}'): cases[''].pop(key)
                            for key in _keys(case) if key.endswith(f'_{variant}')}
            variant_case |= cases[''].pop(variant, {})
            if variant_case:
                shared = {*inputs, 'mode', 'zero_grad_params'}
                if any(key.startswith('grad') for key in variant_case):
                    shared |= {key for key in _keys(case) if call.owner(key) in call.outputs}
                cases[variant] = {k: case[k] for k in shared if k in case} | variant_case
        if len(cases) > 1 and not any(key in cases[''] for key in call.outputs):
            # All numbers are of variants; what they do not know is in none of them.
            left = {k: v for k, v in cases.pop('').items()
                    if not any(k in variant_case for variant_case in cases.values())}
            for key in sorted(map(str, left)):
                report.fail(label, key, 'is not compared: unknown')
        for variant, variant_case in cases.items():
            name = f'{label} {variant}'.strip()
            if variant:
                variant_case = {k: v for k, v in variant_case.items() if not report.omits(name, k)}
            self._run_case(report, name, variant_case, models[variant], call, names[variant], dtype)

    def _run_case(self, report, label, case, model, call, names, dtype):
        def run(report, seed=0):
            target = model
            if str(case.get('mode', '')).startswith('train'):
                target = copy.deepcopy(model).train()  # its buffers change
            return CaseRun(report, label, case, target, call, names, self.device, dtype,
                           seed).run()

        first = len(report.rows)
        for key in sorted(map(str, set(case) - run(report))):
            report.fail(label, key, 'is not compared: unknown')
        if self.device != 'cpu' and dtype.itemsize == 2 and any(
                row.failed and not row.problem for row in report.rows[first:]):
            plain = Report(report.file, self.parity, self.device, self.dtype)
            with mock.patch.object(backends, 'KERNEL_DEVICES', ()):
                for seed in range(ROUNDINGS):
                    run(plain, seed)
            report.allow_twice(plain.rows, first)


def _variants(subject: Subject) -> Iterator[tuple[str, Build]]:
    yield '', subject.build
    for variant, kwargs in subject.variants.items():
        yield variant, Build(subject.build.target, {**subject.build.kwargs, **kwargs})


def _label(number, case):
    """The number of a case, and the first word of what it is called."""
    word = next((case[k] for k in ('name', 'kind', 'mode') if isinstance(case.get(k), str)), '')
    return ' '.join([str(number), *word.split()[:1]])


def _keys(case):
    return [key for key in case if isinstance(key, str)]


def _named(case):
    return {key: case[key] for key in _keys(case)}


def _sections(content: Any) -> Iterator[tuple[str, int, Mapping[str, Any]]]:
    """(name, number, case) of a list of cases, of a single one, or of several named parts.

    Raises:
        UserError: if it is none of these.
    """
    if isinstance(content, list):
        content = {'cases': content}
    if not isinstance(content, Mapping):
        raise UserError(f'holds a {type(content).__name__}, not cases')
    if any(isinstance(value, Tensor) for value in content.values()):
        yield '', 0, content
        return
    for name, part in content.items():
        section = '' if name == 'cases' else str(name)
        if isinstance(part, list) and part and all(isinstance(case, Mapping) for case in part):
            for number, case in enumerate(part):
                yield section, number, case
        elif isinstance(part, Mapping):
            yield section, 0, part
        elif not isinstance(part, str):  # text describes the file
            raise UserError(f'{name} is neither a case nor a list of cases')
