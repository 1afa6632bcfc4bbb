"""Checkpoint files: read without running their code, downloaded once."""

import contextlib
import functools
import hashlib
import http.client
import json
import os
import re
import sys
import urllib.error
import urllib.request
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import filelock
import torch

from vmamba_mm.atomic import atomic_file, write_atomic
from vmamba_mm.checkpoints.formats import read_content, refuse_module, refuse_text
from vmamba_mm.checkpoints.names import infer_arch, infer_task, to_mm
from vmamba_mm.checkpoints.prefixes import find_models
from vmamba_mm.errors import UserError
from vmamba_mm.families import FAMILIES, Family, SeveralFamilies
from vmamba_mm.zoo import SCHEME, published_at, published_sha256, weights_of

WEIGHTS = ('auto', 'model', 'model_ema')
#: Where trainers keep weights, in the order of preference where there are several.
_KEYS = ('model_ema', 'state_dict_ema', 'ema_state_dict', 'state_dict', 'model', '')
#: 'model_ema', 'state_dict_ema', 'swa_model', 'averaged_model', ...
_AVERAGED = re.compile(r'(?:^|[_.])(?:ema|swa|avg|averaged?)(?:[_.]|$)')
_CHUNK = 1 << 20
_TIMEOUT = 60  # seconds without a byte
_LONG = 20 << 20  # bytes of a download that shows its progress


# --- reading --------------------------------------------------------------------------------

def read_checkpoint(source: str | os.PathLike, weights: str = 'auto',
                    map_location: Any = 'cpu', keep_places: bool = False,
                    family: Family | None = None, likely: Collection[Family] = ()
                    ) -> dict[str, Any]:
    """Read a checkpoint of any format; weights of our families come under our names.

    No code of the file runs: besides tensors, plain values, numpy arrays and mmengine's history,
    an object of any other class is read as the plain data in it, and a file that calls a function
    is refused, as are whole pickled models and programs (TorchScript, torch.export).

    Args:
        source: a path, ``file://``, ``http://`` or ``https://`` (downloaded once, see
            :func:`fetch`), or ``vmamba_mm://`` and a name of :func:`vmamba_mm.zoo.find`, such as
            ``vmamba_mm://vmamba/tiny_s1l8``, for published weights. A ``.pth`` of the official
            training (dict of ``model`` and ``model_ema``), a checkpoint of mmengine, timm,
            Lightning or another trainer, a bare state dict, safetensors, the index of weights in
            several parts, or a folder of Hugging Face's or of torch.distributed.checkpoint.
        weights: which of a file that holds two sets: 'model', 'model_ema' (the averaged weights,
            whatever the trainer calls them), or 'auto' for the averaged ones where they are
            present (one printed line says so, except of mmengine's), else the others; of a file
            that was published, by its name or address, those that have the published numbers.
        map_location: of ``torch.load``.
        keep_places: leave a model that lies inside another one in its place, with its names and
            wrappers; see :func:`vmamba_mm.checkpoints.names.to_mm`.
        family: the family that is meant, so that weights that are only in part those of one of its
            models are found as well. None recognises a family only where the names are exactly
            those of its models (:func:`vmamba_mm.families.family_of`).
        likely: families of which one is meant where the names are those of several, such as that of
            the model that the weights are for.

    Returns:
        ``{'meta': ..., 'state_dict': ...}``, with all else that a checkpoint of mmengine holds.
        'meta' has the 'arch' and 'task', as :mod:`vmamba_mm.checkpoints.names` infers them, if the
        model is at ``backbone.``, and in 'weights' which of the two sets it is. A checkpoint of
        another model is returned as it is.

    Raises:
        ValueError: on other ``weights``.
        UserError: if the file is missing, broken, unsafe or none of these formats.
    """
    if weights not in WEIGHTS:
        raise ValueError(f'weights={weights!r} does not exist; choose one of {WEIGHTS}')
    path = fetch(source)
    content = read_content(path, map_location)
    if weights == 'auto' and (entry := published_at(os.fspath(source))) and entry.held_as:
        weights = entry.held_as
    try:
        return select_weights(content, weights, path, keep_places, family)
    except SeveralFamilies as err:
        told = [told_family(source, content)]
        told = [f for f in err.families if f in (told if any(told) else likely)]
        if len(told) == 1:
            return select_weights(content, weights, path, keep_places, told[0])
        if keep_places and err.prefix:
            return content  # the model that has them inside it knows its own names
        raise UserError(f'{path}: {err}') from err


def told_family(source: str | os.PathLike, content: Any) -> Family | None:
    """The family that a name or an address of the zoo, or a file of convert_checkpoint.py, tells.

    Args:
        source: as of :func:`read_checkpoint`.
        content: of the file.
    """
    if entry := published_at(os.fspath(source)):
        return FAMILIES.get(entry.family)
    meta = content.get('meta') if isinstance(content, Mapping) else None
    return FAMILIES.get(meta.get('family')) if isinstance(meta, Mapping) else None


def select_weights(content: Any, weights: str, path: Path, keep_places: bool = False,
                   family: Family | None = None) -> dict[str, Any]:
    """Do the work of :func:`read_checkpoint` on the content of a file that was read already."""
    if not isinstance(content, dict):
        raise UserError(f'{path} holds a {type(content).__name__}, not a checkpoint')
    chosen = choose_weights(content, weights, path, family)
    if chosen is None:
        refuse_module(content, path)
        return content
    key, state, kind = chosen
    checkpoint = {}
    if key == 'state_dict' or _is_swapped(content):
        checkpoint = {k: v for k, v in content.items() if k != key or key == 'state_dict'}
    renamed = to_mm(state, keep_places, family)
    if list(renamed) != list(state) or any(renamed[k] is not state[k] for k in state):
        state = renamed  # else the dict of the file, which modules' versions hang on
    meta = dict(checkpoint.get('meta') or {})
    if kind:
        meta['weights'] = kind
    if isinstance(content.get('epoch'), int) and key:
        meta.setdefault('epoch', content['epoch'])
    at_usual_place = [p for p in find_models(state, family) if p.prefix == 'backbone.']
    if at_usual_place:
        meta['task'] = infer_task(state)
        # Whoever wants all of a model that is there in part says what is missing.
        with contextlib.suppress(UserError):
            meta['arch'] = infer_arch(state, at_usual_place[0].family)
    return dict(checkpoint, meta=meta, state_dict=state)


def choose_weights(content: dict[str, Any], weights: str, path: Path, family: Family | None = None
                   ) -> tuple[str, dict[str, torch.Tensor], str | None] | None:
    """Find a model's weights among all that a file holds.

    Returns:
        The key ('' if the content itself is the weights), the weights as they are named there, and
        'model' or 'model_ema' if the file tells; None if it holds no model of
        our families (of ``family``, if that is given).

    Raises:
        UserError: if there is none of that kind, or several and no telling which.
    """
    states = list(_find_states(content, family))
    held = {key: (state, _kind_of(content, key, state)) for key, state, _ in states}
    model = states[0][2].model if states else ''
    averaged = [key for key, (_, kind) in held.items() if kind == 'model_ema']
    plain = [key for key in held if key not in averaged]
    if weights == 'auto':
        if not held:
            return None
        keys = averaged or plain
    else:
        keys = averaged if weights == 'model_ema' else plain
    if not keys:
        shown = ', '.join(repr(key) for key in held if key)
        raise UserError(f'{path} holds no weights of a {model} under {weights!r}'
                        + (f', only under {shown}' if shown else ''))
    known = [key for key in _KEYS if key in keys]
    if not known and len(keys) > 1:
        raise UserError(f'{path} holds several {model}s, under {", ".join(map(repr, keys))}: save '
                        'the one that is meant alone')
    key = (known or keys)[0]
    state, kind = held[key]
    if weights == 'auto' and averaged and plain and not _is_swapped(content):  # resumes with both
        _say_once(f'{path}: taking the averaged weights, {key!r}, not {plain[0]!r} '
                  "(weights='model', --weights model, takes those)")
    if key == 'ema_state_dict' and kind == 'model':
        state = {k.removeprefix('module.'): v for k, v in state.items()
                 if k.startswith('module.')}
    if len(held) == 1 and key in ('state_dict', '') and kind == 'model':
        kind = None  # the file does not say
    return key, state, kind


def _find_states(content, family, path='', depth=0):
    """(key, state dict, family) of each model; an inner dict's key has a dot for each level."""
    tensors = {k: v for k, v in content.items() if isinstance(v, torch.Tensor)}
    if models := find_models(tensors, family):
        # Beside bare weights there may be an epoch; inside a model, a module's extra state.
        yield (path, content if path or len(tensors) == len(content) else tensors,
               models[0].family)
    elif depth < 3:
        for key, value in content.items():
            if isinstance(value, Mapping):
                yield from _find_states(value, family, f'{path}.{key}' if path else str(key),
                                        depth + 1)


def _is_swapped(content):
    """mmengine's EMAHook: the averaged weights are 'state_dict', the others 'ema_state_dict'."""
    return isinstance(content.get('ema_state_dict'), Mapping) \
        and 'steps' in content['ema_state_dict']


def _kind_of(content, key, state):
    if _is_swapped(content) and key in ('state_dict', 'ema_state_dict'):
        return 'model_ema' if key == 'state_dict' else 'model'
    if key == 'state_dict' and 'current_model_state' in content:  # Lightning's WeightAveraging
        return 'model_ema'
    meta = content.get('meta')
    if key == 'state_dict' and isinstance(meta, Mapping) and meta.get('weights') in WEIGHTS[1:]:
        return meta['weights']  # of a file that convert_checkpoint.py wrote
    if 'n_averaged' in state or _AVERAGED.search(key.lower()):
        return 'model_ema'
    return 'model'


@functools.cache
def _say_once(text):
    if os.environ.get('RANK', '0') == '0':
        print(text, flush=True)


# --- downloading ------------------------------------------------------------------------------

def fetch(source: str | os.PathLike) -> Path:
    """The local path of ``source``; what has a web address is downloaded once.

    Downloads lie in torch.hub's folder (``TORCH_HOME``), each with a record of its address, size
    and SHA-256, which is checked at each later use: a file that has changed is fetched again. A
    file appears under its name only when it is complete, and is what was published where the zoo
    knows its SHA-256. One process downloads for all.

    Raises:
        UserError: if the address cannot be read, or answers with something else.
        OSError: if the disk is full, or not writable.
    """
    text = os.fspath(source)
    if text.startswith(SCHEME):
        text = weights_of(text)
    if text.startswith('file://'):
        return Path(urllib.request.url2pathname(text.removeprefix('file://')))
    if not text.startswith(('http://', 'https://')):
        return Path(text).expanduser()
    url = _quote(text)
    name = re.sub(r'[^\w.\-]', '_', url.rpartition('/')[2].partition('?')[0]) or 'checkpoint'
    folder = Path(torch.hub.get_dir(), 'checkpoints', 'vmamba_mm')
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f'{hashlib.sha256(url.encode()).hexdigest()[:8]}-{name}'
    with filelock.FileLock(path.with_name(f'{path.name}.lock')):
        if not _is_recorded(path, url):
            print(f'Downloading {url} to {path}', flush=True)
            _download(url, path)
    return path


def _quote(url):
    """The official release tags begin with '#', which would cut the address off there."""
    return urllib.request.quote(url, safe="/:?&=%+@,;!$'()*~[]")


def _record_of(path):
    return path.with_name(f'{path.name}.json')


def _is_recorded(path, url):
    """Whether the file in the cache is the one that was downloaded from this address."""
    try:
        record = json.loads(_record_of(path).read_text())
    except (OSError, ValueError):
        return False
    if not path.is_file() or record.get('url') != url:
        return False
    if path.stat().st_size == record.get('size') and sha256_of(path) == record.get('sha256'):
        return True
    print(f'{path} has changed since it was downloaded: fetching it again', flush=True)
    return False


def sha256_of(path: str | os.PathLike) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, 'rb') as f:
        while chunk := f.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _progress(length):
    """A bar as of ``torch.hub``, for a download that one waits for; logs get none."""
    total = int(length) if length is not None else None
    is_long = total is None or total >= _LONG
    return torch.hub.tqdm(total=total, unit='B', unit_scale=True, unit_divisor=1024,
                          disable=not (is_long and sys.stderr.isatty()))


def _download(url, path):
    digest = hashlib.sha256()
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT) as answer, atomic_file(path) as f:
            expected = answer.headers.get('Content-Length')
            with _progress(expected) as bar:
                while chunk := answer.read(_CHUNK):
                    if not f.tell():
                        refuse_text(chunk, url)
                    f.write(chunk)
                    digest.update(chunk)
                    bar.update(len(chunk))
            size = f.tell()
            if not size or expected is not None and size != int(expected):
                raise UserError(f'the download of {url} broke off after {size} of '
                                f'{expected or "?"} bytes; nothing was kept, try again')
            published = published_sha256(url)
            if published not in (None, digest.hexdigest()):
                raise UserError(f'{url} gave a file with the SHA-256 {digest.hexdigest()}, not the '
                                f'published one, {published}; nothing was kept')
    except urllib.error.HTTPError as err:
        raise UserError(f'cannot download {url}: the server says {err.code} {err.reason}') from err
    except (OSError, http.client.HTTPException) as err:
        if getattr(err, 'filename', None) is not None:  # the disk, not the network
            raise
        raise UserError(f'cannot download {url}: {getattr(err, "reason", err)}. Fetch it on a '
                        'machine that can, and give the file in place of the address') from err
    record = dict(url=url, size=size, sha256=digest.hexdigest())
    write_atomic(json.dumps(record, indent=2).encode(), _record_of(path))
