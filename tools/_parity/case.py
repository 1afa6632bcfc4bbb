"""One case of the official code, run on one of our models or functions."""

import pkgutil
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from _parity.report import Report
from _parity.weights import OfficialNames
from vmamba_mm.families.parity import Call, Probe

#: keys of a case that describe it, or that another key explains
DESCRIPTIONS = {'note', 'name', 'mode', 'zero_grad_params'}
#: gradients of several things at once
GRADIENTS = ('grads', 'grad_params', 'grad_params_strided')


class CaseRun:
    """One case on one model or function.

    Args:
        report: for the rows.
        label: of the case.
        case: what the file holds, without what the family omits.
        target: the model, in the dtype and on the device of the run, or a function.
        call: how it is called.
        names: of a model's parameters; None for a function.
        device, dtype: of the inputs.
        seed: changes the inputs within half of the last bit that ``dtype`` keeps; 0 does not.
    """

    def __init__(self, report: Report, label: str, case: Mapping[str, Any], target: Any, call: Call,
                 names: OfficialNames | None, device: str, dtype: torch.dtype, seed: int = 0):
        self.report, self.label, self.case, self.call = report, label, case, call
        self.target, self.names = target, names
        keys = [k for k in (*call.args, *call.kwargs) if k in case]
        rng = torch.Generator().manual_seed(seed) if seed else None
        self.inputs = {k: _prepare(case[k], device, None if k in call.uncast else dtype, rng)
                       for k in keys}
        self.gradients = {k for k in case if isinstance(k, str) and (k == 'grads' or call.owner(k))}
        self.handled = set(keys) | DESCRIPTIONS

    def run(self) -> set[str]:
        """Compare all that the case holds.

        Returns:
            The keys of inputs and of what was compared; all of them if the model does not run.
        """
        missing = [k for k in self.call.args if k not in self.case]
        for key in missing:
            self.report.fail(self.label, key, 'is missing from the case')
        if not missing:
            num_rows = len(self.report.rows)
            with self.report.catch(self.label, 'run'), torch.set_grad_enabled(bool(self.gradients)):
                self._compare_all()
            if any(row.tensor == 'run' for row in self.report.rows[num_rows:]):
                return set(self.case)
        return self.handled

    def _compare_all(self):
        results = self._call()
        compared = [key for key in results if key in self.case]
        if not compared:
            self.report.lack(self.label, self.call.outputs[0], 'is missing from the case')
        for key in compared:
            self.handled.add(key)
            self.report.compare(self.label, key, *map(self._masked, (results[key], self.case[key])))
        if 'buffers_after' in self.case:
            self._compare_buffers()
        if self.gradients - set(results):
            self._compare_gradients(results)

    def _masked(self, value):
        """What the mask of the case, if it has one, leaves of a tensor or of nested lists of some;
        what has not its shape, an error that ``compare`` reports, stays as it is."""
        mask = self.inputs.get(self.call.compared, self.case.get(self.call.compared))
        if mask is None or not isinstance(value, list | tuple | Tensor):
            return value
        if not isinstance(value, Tensor):
            return [self._masked(item) for item in value]
        mask = mask.to(value.device).bool()
        return value[mask] if value.shape[:mask.dim()] == mask.shape else value

    def _call(self):
        """The results by name."""
        call = self.call
        if call.run is not None:
            run = pkgutil.resolve_name(call.run) if isinstance(call.run, str) else call.run
            return dict(run(self.target, self.inputs))
        read, hooks = {}, []
        try:
            for name, probes in call.probes.items():
                for probe in probes if isinstance(probes, tuple) else (probes,):
                    module = self.target.get_submodule(probe.path)
                    hooks.append(_watch(module, probe, read.setdefault(name, [])))
            function = getattr(self.target, call.method) if call.method else self.target
            returned = function(*(self.inputs[k] for k in call.args),
                                **{word: self.inputs[k] for k, word in call.kwargs.items()
                                   if k in self.inputs})
        finally:
            for hook in hooks:
                hook.remove()
        if call.view is not None:
            returned = call.view(returned)
        if isinstance(returned, Mapping):
            results = dict(returned)
        elif len(call.outputs) == 1:
            results = {call.outputs[0]: returned}
        else:
            results = dict(zip(call.outputs, returned, strict=True))
        for name, values in read.items():
            several = isinstance(call.probes[name], tuple)
            results[name] = values if several else values[-1] if values else None
        return results

    def _compare_buffers(self):
        self.handled.add('buffers_after')
        ours = self.names.arrange(dict(self.target.named_buffers()))
        for name, expected in self.case['buffers_after'].items():
            value = ours[name]
            self.report.compare(self.label, f'buffers_after.{name}',
                                None if value is None else value.to(expected.dtype), expected)

    # --- gradients ----------------------------------------------------------------------------

    def _compare_gradients(self, results):
        roots, upstream, by_input = [], [], {}
        for key in sorted(self.gradients - set(GRADIENTS) - set(results)):
            owner = self.call.owner(key)
            if owner in results:
                self.handled.add(key)
                pairs = zip(_leaves(results[owner]), _leaves(self.case[key]), strict=True)
                for result, gradient in pairs:
                    if gradient is not None:
                        roots.append(result)
                        upstream.append(gradient.to(result))
            elif owner in self.inputs:
                by_input[owner] = key
        if not roots:
            roots = _leaves(results.get(self.call.outputs[0]))
            if len(roots) != 1 or roots[0] is None or roots[0].numel() != 1:  # it is no loss
                self.report.lack(self.label, f'grad_{self.call.outputs[0]}',
                                 'is missing from the case')
                return
            upstream = [torch.ones_like(roots[0])]
        if self.names is not None:
            self.target.zero_grad()
        torch.autograd.backward(roots, upstream)
        self._compare_input_gradients(by_input)
        if self.names is not None:
            self._compare_parameter_gradients()

    def _compare_input_gradients(self, by_input):
        stored = self.case.get('grads') or {}
        self.handled.update({'grads'} & set(self.case))
        for name in sorted(set(stored) - set(self.inputs)):
            if not self.report.omits(self.label, f'grads.{name}'):
                self.report.fail(self.label, f'grads.{name}', 'belongs to no input')
        for name, value in self.inputs.items():
            leaves = _leaves(value)
            if name in by_input:
                key, expected = by_input[name], self.case[by_input[name]]
                self.handled.add(key)
            elif name in stored:
                key, expected = f'grads.{name}', stored[name]
            else:
                if any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves):
                    key = f'grads.{name}' if 'grads' in self.case else f'grad_{name}'
                    self.report.lack(self.label, key, 'is missing from the case')
                continue
            ours = [leaf.grad if isinstance(leaf, Tensor) else None for leaf in leaves]
            self.report.compare(self.label, key,
                                ours if isinstance(value, list | tuple) else ours[0], expected)

    def _compare_parameter_gradients(self):
        case, label, report = self.case, self.label, self.report
        full, strided = (case.get(key) or {} for key in GRADIENTS[1:])
        self.handled.update(set(GRADIENTS[1:]) & set(case))
        if not full and not strided:
            if any(p.requires_grad for p in self.target.parameters()):
                report.lack(label, 'grad_params', 'is missing from the case')
            return
        ours = self.names.arrange({name: p.grad for name, p in self.target.named_parameters(
            remove_duplicate=False)})
        largest = max((g.double().norm().item() for g in full.values() if g is not None),
                      default=0.0) or 1.0
        zeros = set(case.get('zero_grad_params') or ())
        for name, expected in full.items():
            value = ours.get(name)
            if expected is None:  # the official graph does not reach it
                expected = torch.zeros(())
                value = expected if value is None else value.norm()
            # What is zero but for rounding has no error relative to itself.
            scale = largest if name in zeros or not expected.any() else None
            report.compare(label, f'grad_params.{name}', value, expected, scale)
        for name, part in strided.items():
            tensor, value = f'grad_params_strided.{name}', ours.get(name)
            steps = tuple(slice(None, None, step) for step in part['step'])
            report.compare(label, tensor, dict(
                value=None if value is None else value[steps],
                sum_sq=None if value is None else value.square().sum()),
                {k: torch.as_tensor(part[k]) for k in ('value', 'sum_sq')})
        stored = {*full, *strided}
        left = [k for k, value in ours.items() if value is not None and k not in stored]
        for name in (*self.names.left, *left):
            report.lack(label, f'grad_params.{name}', 'is missing from the case')


def _watch(module: nn.Module, probe: Probe, values: list) -> Any:
    def keep(value):
        values.append(value if probe.view is None else probe.view(value))

    if probe.side == 'input':
        return module.register_forward_pre_hook(lambda module, args: keep(args[0]))
    return module.register_forward_hook(lambda module, args, output: keep(output))


def _prepare(value, device, dtype, rng=None):
    """Inputs on a device, in a dtype where they are floating-point, as leaves of the graph; by
    ``rng`` rounded one way or the other."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            if rng is not None and dtype is not None:
                by = torch.rand(value.shape, generator=rng) - 0.5
                value = value * (1 + torch.finfo(dtype).eps * by)
            return value.detach().to(device, dtype or value.dtype, copy=True).requires_grad_()
        return value.to(device)
    if isinstance(value, list | tuple):
        return type(value)(_prepare(v, device, dtype, rng) for v in value)
    if isinstance(value, Mapping):
        return {k: _prepare(v, device, dtype, rng) for k, v in value.items()}
    return value


def _leaves(value):
    if isinstance(value, list | tuple):
        return [leaf for v in value for leaf in _leaves(v)]
    if isinstance(value, Mapping):
        return [leaf for v in value.values() for leaf in _leaves(v)]
    return [value]
