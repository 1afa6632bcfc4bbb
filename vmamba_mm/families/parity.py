"""How a family's models are compared with numbers of the official code, by tools/check_parity.py.

A folder of such numbers has the family's name, or one of its ``parity_folders``. It holds sets of
three files: ``NAME.json`` with the arguments of the official constructor, ``NAME.pth`` with the
official checkpoint, and ``NAME.expected.pt`` with cases of inputs, outputs and gradients; and files
such as ``op_NAME.pt`` with cases of single ops or layers. A :class:`Parity` says what of ours
belongs to them. Its two functions receive what a file says beside its tensors, as :class:`Options`,
and give a :class:`Subject`: what to build, how to load it and how to call it. Nothing is passed
over in silence: an option that no function has read, a tensor that is neither an input nor
compared, a gradient that is not stored, and a parameter without a stored gradient are failures,
unless an :class:`Omission` gives the reason.

What each kind of case looks like:

- **A model**, input to output, with gradients::

      def subject(name, options):
          kwargs = options['kwargs']
          return Subject(Build('vmamba_mm.models:Vim', dict(arch=dict(
              embed_dims=kwargs['embed_dim'], depth=kwargs['depth']))))

- **A classifier**: ``Build('vmamba_mm.testing:Classifier', dict(num_classes=..., backbone=Build(
  'vmamba_mm.models:VMamba', ...)))``. Arguments may be built themselves.
- **Options that our model has not**: ``kwargs.require('norm_layer', 'ln2d')`` fails on any other
  value; ``kwargs.ignore('drop_path_rate')`` takes every one, where it has no effect here.
- **Several inputs**: ``Call(args=('input', 'timesteps', 'labels'))`` passes them in this order,
  ``kwargs={'attention_mask': 'mask'}`` by the keyword ``mask`` where a case has one. Lists of
  tensors (pairs of images, a permutation or a noise for each layer) are passed as lists.
- **Several outputs**: ``outputs=('tokens', 'pooled')`` names what the model returns, in order; one
  name stands for all of it, a tensor or a list. A dict is taken by its keys.
- **Intermediate tokens, features before the head**: ``probes={'features': Probe('head',
  side='input'), 'hidden': (Probe('stages.0'), Probe('stages.1'))}`` reads what a submodule
  receives or returns.
- **Procedures** (prefill and then one token at a time, states, samplers): ``run=function`` calls
  ``function(model, inputs)``, which returns a dict of results by the case's names. Nested ones,
  such as ``{'state': {'conv': ..., 'ssm': ...}}``, are compared leaf by leaf, integers exactly.
- **Padding**: ``compared='attention_mask'`` compares only the positions where that tensor of the
  case is not 0, since what a model makes of padding means nothing.
- **Cases of several methods**: ``call`` may be a function from a case's options to a ``Call``, for
  example by ``case.get('kind')``.
- **Cases in train mode** have ``mode='train ...'`` and ``buffers_after``; a copy of the model runs.
- **Gradients**: ``grad_NAME`` of an output is what is propagated back (none for a loss, a scalar);
  ``grad_NAME`` or ``grads[NAME]`` of an input, ``grad_params``, ``grad_params_strided`` (every
  step-th element, and the sum of squares) and ``zero_grad_params`` (which are zero but for
  rounding) are compared. Parameters go by their official names: numbers of elements are renamed by
  the family's rows, or sent through ``convert``, so that whatever it does to a weight, short of
  arithmetic, is undone for its gradient. ``gradients={'grad_y': 'y_bhwc'}`` says where a gradient
  has another name.
- **Two formulas** in one case: ``variants={'paper': dict(mode='paper')}`` builds the model again
  with these arguments for the keys that end in ``_paper``, or that lie in a dict ``paper``.
- **States after loading**: ``loaded={OUR_NAME: KEY}`` compares with a tensor beside the cases, or
  in the checkpoint; ``initial='extra_state'`` sets weights before loading; ``has_cases=False``
  where there is nothing else to compare. ``into='backbone'`` loads the file into that part alone.
- **A layer alone in a file**: ``Build('vmamba_mm.layers:Mamba2', ...)``, with ``convert`` for its
  names and ``within=('model', 'projector')`` for its place in the file.
- **A file of an op or a layer**: ``ops={'op_ssd.pt': function}``; the function takes the name of
  the section and the case's options and gives a ``Subject``, whose ``Build`` names a function, or a
  class, with ``state='state_dict'`` for the case's key that holds its weights.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any

__all__ = ['Build', 'Call', 'Limit', 'Omission', 'Options', 'Parity', 'Probe', 'Size', 'Subject']


class Options(Mapping):
    """The values of a file beside its tensors; knows which of them nobody has read.

    Dicts in it are options as well. Tensors cannot be read: what goes into a model is named by a
    :class:`Call`, and what is compared must not be known beforehand.

    Args:
        values: from a JSON file or a case.
        place: of the values in the file, for messages.
    """

    def __init__(self, values: Mapping[str, Any], place: str = ''):
        self._values = {key: Options(value, f'{place}{key}.')
                        if isinstance(value, Mapping) and all(isinstance(k, str) for k in value)
                        else value for key, value in values.items() if not _has_tensors(value)}
        self._place = place
        self._read: set[str] = set()
        self._ignored: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        if key not in self._values:
            raise KeyError(f'{self._place}{key}')
        value = self._values[key]
        self._read.add(key)
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, key: object) -> bool:
        return key in self._values

    def require(self, key: str, *choices: Any) -> Any:
        """A value that must be one of the choices where the key is there at all.

        Raises:
            ValueError: on another one.
        """
        if key not in self:
            return None
        if (value := self[key]) not in choices:
            raise ValueError(f'{self._place}{key}={value!r} has no counterpart here, only '
                             f'{" or ".join(map(repr, choices))}')
        return value

    def ignore(self, *keys: str) -> None:
        """Take whatever value these keys have: they change nothing that is compared."""
        self._ignored.update(keys)

    def unread(self) -> list[str]:
        """The names of the values that nobody has read, with their place."""
        names = []
        for key, value in self._values.items():
            if key in self._ignored:
                continue
            if key not in self._read:
                names.append(f'{self._place}{key}')
            elif isinstance(value, Options):
                names += value.unread()
        return names


def _has_tensors(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_has_tensors, value.values()))
    if isinstance(value, list | tuple):
        return any(map(_has_tensors, value))
    return hasattr(value, 'untyped_storage')


@dataclass(frozen=True)
class Build:
    """A class or function of ours, ``package.module:name``, and its keyword arguments.

    A class is called with them; a function keeps them for its calls. Arguments may be ``Build``
    too, or of a layer ``Size``.
    """

    target: str
    kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Size:
    """An argument of a ``Build`` that a case of a layer says by the shape of a tensor alone, be it
    an input or a weight."""

    tensor: str
    dim: int


@dataclass(frozen=True)
class Probe:
    """The result of a submodule in a call, or its first argument."""

    path: str
    side: str = 'output'  #: or 'input'
    #: Applied to it, for example to transpose it or to take every 16th channel.
    view: Callable[[Any], Any] | None = None


@dataclass(frozen=True)
class Call:
    """The call of a case: which of its tensors go in, and what the results are called in it."""

    #: Keys of the case whose values are the positional arguments; a case has all of them.
    args: tuple[str, ...] = ('input',)
    #: Key of the case -> keyword; a case need not have them.
    kwargs: Mapping[str, str] = field(default_factory=dict)
    #: What the call returns: one name for all of it, or one for each element of a tuple.
    outputs: tuple[str, ...] = ('output',)
    #: The method of the model; '' calls the model itself.
    method: str = ''
    #: Applied to what is returned, such as ``lambda logits: [logits]`` where the case has a list.
    view: Callable[[Any], Any] | None = None
    #: In place of a plain call: (model or function, inputs by key of the case) -> results by name.
    #: Or where this function is, ``package.module:name``.
    run: Callable[[Any, dict[str, Any]], Mapping[str, Any]] | str | None = None
    #: Name of a result -> where it is read.
    probes: Mapping[str, Probe | tuple[Probe, ...]] = field(default_factory=dict)
    #: Key of a case with a mask, of the first dimensions of results: only what is not 0 there is
    #: compared, such as tokens beside padding. A case need not have it.
    compared: str = ''
    #: Inputs that keep their dtype in half precision, such as coordinates.
    uncast: tuple[str, ...] = ()
    #: Key of a gradient -> input or output that it belongs to, where it is not 'grad_' + that.
    gradients: Mapping[str, str] = field(default_factory=dict)

    def owner(self, key: str) -> str:
        """The input or output that the gradient under this key belongs to; '' for other keys."""
        usual = 'y' if key == 'gy' else key[len('grad_'):] if key.startswith('grad_') else ''
        return self.gradients.get(key, usual)


@dataclass(frozen=True)
class Subject:
    """The model or function that one file, or one case of an op, is compared with."""

    build: Build
    #: A ``Call``, or a function from the case's options to one.
    call: Call | Callable[[Options], Call] = Call()
    #: (weights by official names) -> by ours; None for the package's own conversion.
    convert: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None
    #: Where the weights lie in the file, for ``convert``; () for the file itself.
    within: tuple[str, ...] = ()
    #: Our submodule that the file is loaded into; '' for the whole model.
    into: str = ''
    #: Arguments of the model's ``load_pretrained``, or of ``read_checkpoint`` where it has none,
    #: such as ``dict(weights='model')``.
    load: Mapping[str, Any] = field(default_factory=dict)
    #: Key of the expected file with weights, by official names, that are set before loading.
    initial: str = ''
    #: Our name of a weight -> key of the expected file or of the checkpoint, compared once loaded.
    loaded: Mapping[str, str] = field(default_factory=dict)
    #: Key of an op's case that holds the weights of a layer.
    state: str = ''
    #: Suffix of a case's keys -> arguments that differ from those of ``build``.
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    #: Whether there is a NAME.expected.pt.
    has_cases: bool = True


@dataclass(frozen=True)
class Omission:
    """Why something is not compared. All but ``reason`` are patterns, as of ``fnmatch``.

    ``tensor`` is a place in the file, such as ``perm_seed``, ``grad_params.head.bias`` or
    ``grad_params``. ``file`` is the name of the checkpoint or of the op's file, ``case`` its number
    and the first word of its name, kind or mode, as in the tool's table.
    """

    tensor: str
    reason: str
    file: str = '*'
    case: str = '*'

    def holds(self, file: str, case: str, tensor: str) -> bool:
        return _matches(self, file, case, tensor)


@dataclass(frozen=True)
class Limit:
    """Another limit than the usual one in fp32 (or fp64, of ops) on a CPU, and why."""

    tensor: str
    error: float
    reason: str
    file: str = '*'
    case: str = '*'

    def holds(self, file: str, case: str, tensor: str) -> bool:
        return _matches(self, file, case, tensor)


def _matches(rule: Omission | Limit, file: str, case: str, tensor: str) -> bool:
    return fnmatch(tensor, rule.tensor) and fnmatch(file, rule.file) and fnmatch(case, rule.case)


@dataclass(frozen=True)
class Parity:
    """The numbers that a family is compared with; see the module.

    ``subject`` is called with the name of a checkpoint file and its options: of NAME.json, and
    what NAME.expected.pt says beside its cases.
    """

    subject: Callable[[str, Options], Subject]
    #: File of op or layer cases -> (section of the file, options of the case) -> subject.
    ops: Mapping[str, Callable[[str, Options], Subject]] = field(default_factory=dict)
    #: What files hold and is not compared.
    omissions: tuple[Omission, ...] = ()
    #: What files should hold and do not; ``gradients`` are all of a file, ``cases`` too.
    absences: tuple[Omission, ...] = ()
    limits: tuple[Limit, ...] = ()
    #: What is appended to NAME for each checkpoint that belongs to one NAME.expected.pt.
    checkpoints: tuple[str, ...] = ('.pth',)
    #: What models are compared in on a CPU. 'fp64' where rounding in fp32 would turn a ReLU on or
    #: off, which changes gradients by more than a limit that finds errors; ``limits`` then say how
    #: far the stored numbers, of fp32, are from those of fp64.
    models_in: str = 'fp32'
