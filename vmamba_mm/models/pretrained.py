"""Weights into a backbone: all that it has, by our names or official ones, or one clear error."""

import inspect
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from mmengine.logging import MMLogger
from mmengine.model import update_init_info
from torch import Tensor, nn

from vmamba_mm.checkpoints.compare import (
    adapt_in_channels,
    check_patterns,
    differences,
    explain_differences,
    find_excused,
)
from vmamba_mm.checkpoints.files import read_checkpoint
from vmamba_mm.checkpoints.names import (
    describe_places,
    infer_arch,
    is_official,
    our_shape,
    rename_official,
    to_mm,
)
from vmamba_mm.checkpoints.prefixes import drop_wrappers, find_models, inside
from vmamba_mm.config import type_name
from vmamba_mm.errors import UserError
from vmamba_mm.families import Family, resolve_arch
from vmamba_mm.families.names import (
    has_row,
    is_counter,
    is_of_trainer,
    our_rows,
    plain_name,
)

_PRETRAINED = ('Pretrained', 'PretrainedInit')
#: The norms of outputs, which belong to the task and not to the backbone.
OUTPUT_NORM = re.compile(r'(?:norm(\d+)|pool_norm)\.')


class StrictLoading:
    """Makes a backbone, which is a ``BaseModule``, load weights completely or not at all."""

    family: Family

    def init_weights(self) -> None:
        """Initialise as mmengine does; ``init_cfg=dict(type='Pretrained', ...)`` loads strictly.

        The dict takes the arguments of :meth:`load_pretrained`.
        """
        init_cfg = self.init_cfg
        cfgs = [init_cfg] if isinstance(init_cfg, dict) else list(init_cfg or ())
        pretrained = [c for c in cfgs if type_name(c) in _PRETRAINED]
        if self._is_init or not pretrained:
            super().init_weights()
            return
        arguments = [{k: v for k, v in c.items() if k != 'type'} for c in pretrained]
        for kwargs in arguments:
            _check_keys(kwargs, self.load_pretrained, self.family.model)
        self.init_cfg = [c for c in cfgs if c not in pretrained]
        super().init_weights()
        self.init_cfg = init_cfg
        for kwargs in arguments:
            self.load_pretrained(**kwargs)
            if hasattr(self, '_params_init_info'):
                update_init_info(self, init_info=f'loaded from {kwargs["checkpoint"]}')

    def load_pretrained(self, checkpoint: str, prefix: str | None = None,
                        weights: str = 'auto', map_location: Any = 'cpu',
                        adapt_in_channels: bool = False, strict: bool | None = None,
                        allow: str | Sequence[str] = ()) -> None:
        """Load the backbone of a checkpoint, official or ours; all of it, or raise.

        The norms of the outputs, ``norm{i}``, belong to the task: they are loaded if the
        checkpoint has all that this model has, and stay as they are otherwise, as the published
        detectors and segmentors started from classifiers. A head beside the backbone is ignored.

        What a model of this architecture has must be in the checkpoint. What a user added to the
        model (modules of a subclass, buffers, adapters), or to the model in the checkpoint,
        follows ``strict``.

        Args:
            checkpoint, weights, map_location: as of
                :func:`vmamba_mm.checkpoints.files.read_checkpoint`.
            prefix: where the backbone lies in the checkpoint; None for ``'backbone.'``, where
                official files have it too under our names, or for the only such model there is.
            adapt_in_channels: adapt the stem's first convolution to ``in_channels``, as timm
                does: :func:`vmamba_mm.checkpoints.compare.adapt_in_channels`.
            strict: None: what a user added to the model may be missing from the checkpoint, and
                stays as it is, but nothing may be left over. True: it may not be missing either.
                False: what the model has no place for may be left over too.
            allow: regular expressions of names that may be missing, left over or of another
                shape, such as ``['^stages.3', 'norm1']``; the names are this model's, with or
                without ``backbone.`` before them. Another architecture is refused all the same.

        Raises:
            UserError: if the file cannot be read, or any weight is missing, left over or of
                another shape; it names the architecture that the file holds. The model is then as
                it was.
        """
        self._load(self.adapt_weights, checkpoint, prefix, weights, map_location,
                   adapt_in_channels, strict, allow)

    def _load(self, adapt, checkpoint, prefix, weights, map_location, adapt_in_channels, strict,
              allow):
        """Do the work of :meth:`load_pretrained`.

        Args:
            adapt: in place of :meth:`adapt_weights`, where a subclass has options for it.
        """
        state = self._find_backbone(checkpoint, prefix, weights, map_location)
        ours = self.state_dict()
        norms = {k for k in ours if OUTPUT_NORM.match(k)}
        parameters = self._complete(under_names_of(self.family, state, ours), checkpoint)
        logger = MMLogger.get_current_instance()
        if not norms <= set(parameters):
            logger.info(f'{checkpoint} has not the norms of all outputs {self.out_indices}: they '
                        'start anew')
            parameters.update({k: v for k, v in ours.items() if k in norms})
        parameters = {k: v for k, v in parameters.items()
                      if k in norms or not OUTPUT_NORM.match(k)}
        if adapt_in_channels:
            self._adapt_stem(parameters, ours, checkpoint)
        parameters = adapt(parameters)
        left = check_fits(self, parameters, str(checkpoint), strict, allow)
        if left:
            logger.info(f'Not loaded from {checkpoint} (missing, left over or of another shape): '
                        f'{", ".join(left[:20])}'
                        + (f' and {len(left) - 20} more' if len(left) > 20 else ''))
        self.load_state_dict({k: v for k, v in parameters.items() if k not in left}, strict=False)

    @classmethod
    def arguments_of(cls, weights: Mapping[str, Tensor]) -> dict[str, Any]:
        """The arguments beside ``arch`` that weights tell: outputs with norms, and the channels of
        images.

        Args:
            weights: of a checkpoint, by this model's names.
        """
        found = [OUTPUT_NORM.match(name) for name in weights]
        outputs = sorted({int(match[1]) for match in found if match and match[1]})
        firsts = [weights[name] for name in cls.family.first_convs if name in weights]
        return (dict(out_indices=outputs) if outputs else {}) | (
            dict(in_channels=firsts[0].shape[1]) if firsts else {})

    def adapt_weights(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights for :meth:`load_pretrained`, changed to fit this model; a subclass may need it.

        Such as a position embedding, which is resized to the grid of this model's image size.

        Args:
            weights: of a checkpoint, by this model's names; none of them need be there.
        """
        return weights

    def complete_weights(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights with those that files leave out because others say them; a subclass may need it.

        Such as the weight of a head that is tied to an embedding.

        Args:
            weights: all of a state dict, or a part, by this model's names.

        Raises:
            UserError: if weights contradict each other.
        """
        return weights

    def _complete(self, weights, checkpoint):
        try:
            return self.complete_weights(weights)
        except UserError as err:
            raise UserError(f'{checkpoint}: {err}') from err

    def _find_backbone(self, checkpoint, prefix, weights, map_location):
        """The weights of the backbone in a checkpoint, by their names without the prefix."""
        family = self.family
        full_prefix = f'{(prefix or "backbone").rstrip(".")}.'
        is_usual = full_prefix == 'backbone.'
        state = read_checkpoint(checkpoint, weights, map_location, keep_places=not is_usual,
                                family=family)
        state = state.get('state_dict', state)
        state = drop_wrappers({k: v for k, v in state.items() if isinstance(k, str)})
        prefixes = [p.prefix for p in find_models(state, family)]
        if is_usual and full_prefix not in prefixes:
            if len(prefixes) > 1:
                raise UserError(f'{checkpoint} holds {describe_places(state, family)}: say with '
                                'prefix= which one is meant')
            full_prefix = prefixes[0] if prefixes else full_prefix
        below = inside(state, full_prefix)
        if not below:
            tops = sorted({k.partition('.')[0] for k in state})
            raise UserError(f'{checkpoint} has no weights that begin with {full_prefix!r}, only '
                            f'with: {", ".join(tops[:8])}'
                            + (f'; it holds {describe_places(state, family)}' if prefixes else ''))
        # A classifier around a bare backbone has its head beside the stages.
        heads = our_rows(family.head_rows(below))
        return {k: v for k, v in below.items() if not has_row(k, heads) or k in self.state_dict()}

    def _adapt_stem(self, weights, ours, checkpoint):
        for key in self.family.first_convs:
            if key in weights and key in ours and weights[key].dim() == ours[key].dim():
                try:
                    weights[key] = adapt_in_channels(weights[key], ours[key].shape[1])
                except UserError as err:
                    raise UserError(f'{checkpoint}: {err}') from err

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        """Take official names, and refuse a state dict that is not this model's.

        mmengine loads whole models with strict=False and only logs what did not fit: what a
        model of this architecture has must be complete there. ``load_state_dict(part,
        strict=False)`` of torch, of this model or of one around it, loads a part, unless it has
        none of this model's names. Norms of outputs that this model does not have are left to
        ``strict``.
        """
        caller = find_caller()
        below = inside(state_dict, prefix)
        renamed = self._complete(under_names_of(self.family, below, self.state_dict()),
                                 'the state dict')
        if list(renamed) != list(below):
            for key in below:
                del state_dict[prefix + key]
            state_dict.update({prefix + k: v for k, v in renamed.items()})
        # As the last of the hooks: those of others may rename what they know.
        check = self.register_load_state_dict_pre_hook(
            lambda _, state, *args: self._check_state(inside(state, prefix), prefix, caller))
        try:
            super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        finally:
            check.remove()

    def _check_state(self, below, prefix, caller):
        ours = self.state_dict()
        if not (caller.strict or caller.is_mmengine):
            if not prefix and not set(below) & set(ours):
                check_fits(self, below, 'the state dict')
            return
        if not below and isinstance(caller.state_dict, Mapping):
            self._refuse_other_place(caller.state_dict, prefix)
        below = {k: v for k, v in below.items() if k in ours or not OUTPUT_NORM.match(k)}
        check_fits(self, below, 'the state dict', caller.strict, is_whole=True)

    def _refuse_other_place(self, state_dict, prefix):
        """Raise one line if the model's weights are in the state dict, and not where it is."""
        model = self.family.model
        for key, state in (('', state_dict), *state_dict.items()):
            if isinstance(state, Mapping) and find_models(state, self.family):
                held = f'{f"under {key!r} " if key else ""}{describe_places(state, self.family)}'
                try:
                    to_mm(state)
                except UserError as err:  # it was not recognised: half of it, or more than it
                    raise UserError('the state dict does not fit the model: it holds '
                                    f'{held}: {err}') from err
                raise UserError(
                    f'the state dict does not fit the model: it holds {held}, and nothing under '
                    f'{prefix!r}, where the model has its {model}; tools/convert_checkpoint.py '
                    f'brings a {model} alone to its usual place, and so does mmengine with '
                    "custom_imports = dict(imports=['vmamba_mm.mm']) in the config")

    def plain_state(self, arch: str | Mapping[str, Any] | None = None) -> dict[str, Tensor]:
        """Names and shapes (3 channels) of a model that nobody added to, on the device meta.

        Args:
            arch: as of the class; None for this model's.
        """
        plain = next(cls for cls in type(self).__mro__ if 'family' in vars(cls))
        arch = self.arch if arch is None else resolve_arch(self.family, arch)
        fits = self.out_indices[-1] < len(plain.stage_sizes(arch)[0])
        with torch.device('meta'):
            return plain(arch, self.out_indices if fits else None,
                         **(self.output_options if fits else {})).state_dict()


# --- whose weights these are ------------------------------------------------------------------

def is_same(first: Tensor | None, second: Tensor | None) -> bool:
    """Whether two names of one weight have the same values, as far as can be told: one may be
    absent, or without values, and shapes are compared elsewhere."""
    if first is None or second is None or first is second or first.is_meta or second.is_meta:
        return True
    return first.shape != second.shape or torch.equal(first, second.to(first))


class Caller(NamedTuple):
    """The ``load_state_dict`` at work."""

    strict: bool
    is_mmengine: bool
    state_dict: Any


def find_caller() -> Caller:
    """Find the ``load_state_dict`` that called a module's ``_load_from_state_dict``.

    Neither torch nor mmengine passes ``strict`` on to the modules (both pass True), and mmengine's
    own function, with strict=False, loads what nobody has looked at: only the frame tells a
    deliberate part from a wrong file. Without one the answer is strict.
    """
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == 'load_state_dict' and 'strict' in frame.f_locals:
            package = frame.f_globals.get('__name__', '').partition('.')[0]
            return Caller(bool(frame.f_locals['strict']), package == 'mmengine',
                          frame.f_locals.get('state_dict'))
        frame = frame.f_back
    return Caller(True, False, None)


def under_names_of(family: Family, weights: Mapping[str, Tensor], ours: Mapping[str, Tensor]
                   ) -> dict[str, Tensor]:
    """Weights by a model's own names: official ones renamed, other wrappers replaced."""
    if is_official(weights, family):
        unchanged = {k: our_shape(k, v, family) for k, v in weights.items() if k in ours}
        official = drop_wrappers({k: v for k, v in weights.items() if not (
            k in ours or is_counter(k) or is_of_trainer(k))})
        weights = unchanged | rename_official(official, family, set(map(plain_name, weights)))
    if set(weights) <= set(ours):
        return dict(weights)
    plain = {plain_name(k): k for k in ours}
    return {k if k in ours else plain.get(plain_name(k), k): v for k, v in weights.items()}


def check_fits(model: nn.Module, weights: Mapping[str, Tensor], name: str,
               strict: bool | None = None, allow: str | Sequence[str] = (),
               is_whole: bool = False) -> list[str]:
    """Raise one line if weights are not a backbone's.

    Args:
        model: the backbone.
        weights: by the model's names.
        name: of the file, for the message.
        strict, allow: as in ``StrictLoading.load_pretrained``.
        is_whole: the weights should be all of a model, so that strict=False excuses what a user
            added, and no weight of ours that the model lacks.

    Returns:
        The names of what was given, or is the model's, and cannot be loaded, all of them excused.
    """
    patterns = check_patterns(allow or (), 'allow')
    expected = model.state_dict()
    wrong = differences(expected, weights)
    if not wrong:
        return []
    plain = model.plain_state()
    if is_whole and weights and set(weights) <= set(expected) - set(plain):
        return []  # adapters alone
    tolerated = {k for k in wrong
                 if (k not in weights and k not in plain and strict is not True)
                 or (k not in expected and strict is False and not (is_whole and k in plain))}
    excused = {k.removeprefix('backbone.') for k in
               find_excused([f'backbone.{k}' for k in wrong], patterns)}
    rest = {k: v for k, v in wrong.items() if k not in tolerated | excused}
    hint = ''
    if not rest and any(k in weights or k in excused for k in wrong) \
            and _are_of_another_arch(model, weights, plain):
        rest, hint = wrong, '; neither strict nor allow excuses another architecture'
    if rest:
        expected, weights = ({f'backbone.{k}': v for k, v in state.items()}
                             for state in (expected, weights))
        raise UserError(explain_differences(rest, expected, weights, name) + hint)
    return sorted(wrong)


def _are_of_another_arch(model, weights, plain):
    """Whether weights, complete or in part, are those of another architecture of the family."""
    family = model.family
    wanted = infer_arch(plain, family)
    try:
        if infer_arch({**plain, **weights}, family) != wanted:  # what is absent says nothing
            return True
        held = infer_arch(weights, family)
        held_weights = model.plain_state(held)
    except (UserError, ValueError):
        return False  # a part
    return held != wanted and all(k in weights for k in held_weights if not k.startswith('norm'))


def _check_keys(given: Mapping[str, Any], function: Callable, model: str) -> None:
    """Raise one line that names the keys if ``given`` are none to call ``function`` with."""
    parameters = inspect.signature(function).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    unknown = sorted(set(given) - set(parameters))
    if unknown or 'checkpoint' not in given:
        wrong = f'has no key {", ".join(map(repr, unknown))}' if unknown else \
            "needs the key 'checkpoint'"
        raise TypeError(f"init_cfg=dict(type='Pretrained', ...) of {model} {wrong}; its keys are "
                        f'{", ".join(parameters)}')
