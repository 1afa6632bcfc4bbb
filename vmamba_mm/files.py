"""Checkpoint files: read without running their code, downloaded once."""

import contextlib
import hashlib
import http.client
import json
import os
import re
import urllib.error
import urllib.request
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch

from vmamba_mm.atomic import atomic_file, write_atomic
from vmamba_mm.checkpoint import infer_arch, infer_task, is_vmamba, to_mm
from vmamba_mm.compat import UserError, safe_numpy_types

WEIGHTS = ('auto', 'model', 'model_ema')
_CHUNK = 1 << 20
_TIMEOUT = 60  # seconds without a byte


# --- reading --------------------------------------------------------------------------------

def read_checkpoint(source: str | os.PathLike, weights: str = 'auto',
                    map_location: Any = 'cpu') -> dict[str, Any]:
    """Read a checkpoint of any format; VMamba weights come under our names.

    No code of the file runs: besides tensors, plain values, numpy arrays and mmengine's history,
    an object of any other class is read as the plain data in it, and a file that calls a function
    is refused.

    Args:
        source: a path, ``file://``, ``http://`` or ``https://`` (downloaded once, see
            :func:`fetch`). A ``.pth`` of the official training (dict of ``model`` and
            ``model_ema``), a checkpoint of mmengine, a bare state dict, or safetensors.
        weights: which of an official training file: 'model', 'model_ema' (the averaged weights),
            or 'auto' for ``model_ema`` where it is present, else ``model``.
        map_location: of ``torch.load``.

    Returns:
        ``{'meta': ..., 'state_dict': ...}``, with all else that a checkpoint of mmengine holds.
        'meta' has the 'arch' and 'task', as :mod:`vmamba_mm.checkpoint` infers them. A checkpoint
        of another model is returned as it is.

    Raises:
        ValueError: on other ``weights``.
        UserError: if the file is missing, broken, unsafe or none of these formats.
    """
    if weights not in WEIGHTS:
        raise ValueError(f'weights={weights!r} does not exist; choose one of {WEIGHTS}')
    path = fetch(source)
    if _find_kind(path) == 'safetensors':
        content = _read_safetensors(path)
    else:
        content = _read_pickle(path, map_location)
    if not isinstance(content, dict):
        raise UserError(f'{path} holds a {type(content).__name__}, not a checkpoint')
    chosen = _choose(content, weights, path)
    if chosen is None:
        return content
    checkpoint = dict(content) if chosen == 'state_dict' else {}
    state = content if chosen == '' else content[chosen]
    if not any(k.startswith('backbone.stages.') for k in state):
        state = to_mm(state)
    meta = dict(checkpoint.get('meta') or {})
    if chosen in ('model', 'model_ema'):
        meta['weights'] = chosen
        if isinstance(content.get('epoch'), int):
            meta['epoch'] = content['epoch']
    if any(k.startswith('backbone.stages.') for k in state):
        meta.update(arch=infer_arch(state), task=infer_task(state))
    return dict(checkpoint, meta=meta, state_dict=state)


def _choose(content, weights, path):
    """The key of the chosen VMamba weights; '' if they are the content itself, None without."""
    held = [k for k in ('model_ema', 'state_dict', 'model')
            if isinstance(content.get(k), dict) and is_vmamba(content[k])]
    if weights == 'auto':
        return held[0] if held else '' if is_vmamba(content) else None
    if weights not in held:
        raise UserError(f'{path} holds no weights of a VMamba under {weights!r}'
                        + (f', only under {", ".join(map(repr, held))}' if held else ''))
    return weights


def _find_kind(path):
    """'safetensors' or 'pickle' by the first bytes; one clear line for what is neither."""
    if not path.is_file():
        what = 'is a folder' if path.is_dir() else 'does not exist'
        raise UserError(f'the checkpoint {path} {what}')
    with open(path, 'rb') as f:
        start = f.read(512)
    _refuse_text(start, path)
    if start[8:9] == b'{' and int.from_bytes(start[:8], 'little') < path.stat().st_size:
        return 'safetensors'
    return 'pickle'


def _refuse_text(start, name):
    """A server's answer in place of the file."""
    text = start.lstrip().lower()
    if not text:
        raise UserError(f'{name} is empty')
    if text.startswith((b'<!doctype', b'<html', b'<?xml')):
        raise UserError(f'{name} is a web page, not a checkpoint: the server answered with a page '
                        'in place of the file; download it again')
    if text.startswith(b'version https://git-lfs'):
        raise UserError(f'{name} is a pointer of Git LFS, not the file itself: run git lfs pull')


def _read_safetensors(path):
    try:
        from safetensors import safe_open
    except ImportError as err:
        raise UserError(f'{path} needs the package safetensors: pip install safetensors') from err
    try:
        with safe_open(path, 'pt') as f:
            meta = json.loads((f.metadata() or {}).get('meta', '{}'))
            return dict(meta=meta, state_dict={k: f.get_tensor(k) for k in f.keys()})  # noqa: SIM118
    except Exception as err:
        raise _unreadable(path, err) from err


def _read_pickle(path, map_location):
    try:
        if not zipfile.is_zipfile(path):  # written by torch < 1.6, or cut off
            return torch.load(path, map_location, weights_only=True)
        with torch.serialization.safe_globals(_find_stand_ins(path)):
            return torch.load(path, map_location, weights_only=True, mmap=True)
    except UserError as err:
        raise UserError(f'{path} is not safe to load: {err}') from err
    except Exception as err:
        found = re.search(r'GLOBAL (\S+)', str(err))
        if found:
            raise UserError(f'{path} is not safe to load: it holds {found[1]}, which could run '
                            'code') from err
        raise _unreadable(path, err) from err


def _unreadable(path, err):
    reason = str(err).strip().partition('\n')[0] or type(err).__name__
    return UserError(f'{path} cannot be read as a checkpoint (incomplete, or not one): {reason}')


def _find_stand_ins(path):
    """[(what the pickle gets, name in it)] for names that torch.load refuses; none is imported."""
    numpy_types = safe_numpy_types()
    stand_ins = [(t, name) for name, t in numpy_types.items()]
    for name in torch.serialization.get_unsafe_globals_in_checkpoint(path):
        if name not in numpy_types:
            stand_in = _getattr if name == 'builtins.getattr' else _Calls(name, (_Data,), {})
            stand_ins.append((stand_in, name))
    # safe_globals would remove at its end what was allowed before.
    allowed = torch.serialization.get_safe_globals()
    return [pair for pair in stand_ins if pair not in allowed]


class _Calls(type):
    """A class that can be instantiated by a pickle's NEWOBJ, which runs no code, and not called."""

    def __call__(cls, *args, **kwargs):
        raise UserError(f'it calls {cls.__name__}, which could run code')


class _Data(metaclass=_Calls):
    """The plain data of an object whose class is not looked at, such as yacs' CfgNode."""

    def __new__(cls, *args):
        return OrderedDict()


def _getattr(owner, name):
    """mmengine's history pickles its own methods as getattr(HistoryBuffer, name)."""
    if not (isinstance(owner, _Calls) and owner.__name__.startswith('mmengine.')):
        raise UserError('it calls getattr, which could run code')
    return f'{owner.__name__}.{name}'


# --- downloading ------------------------------------------------------------------------------

def fetch(source: str | os.PathLike) -> Path:
    """The local path of ``source``; a web address is downloaded once.

    Downloads lie in torch.hub's folder (``TORCH_HOME``), each with a record of its address, size
    and SHA-256, which is checked at each later use: a file that has changed is fetched again. A
    file appears under its name only when it is complete, and one process downloads for all.

    Raises:
        UserError: if the address cannot be read, or answers with something else.
        OSError: if the disk is full, or not writable.
    """
    text = os.fspath(source)
    if text.startswith('file://'):
        return Path(urllib.request.url2pathname(text.removeprefix('file://')))
    if not text.startswith(('http://', 'https://')):
        return Path(text).expanduser()
    url = _quote(text)
    name = re.sub(r'[^\w.\-]', '_', url.rpartition('/')[2].partition('?')[0]) or 'checkpoint'
    folder = Path(torch.hub.get_dir(), 'checkpoints', 'vmamba_mm')
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f'{hashlib.sha256(url.encode()).hexdigest()[:8]}-{name}'
    with _lock(path.with_name(f'{path.name}.lock')):
        if not _is_recorded(path, url):
            print(f'Downloading {url} to {path}', flush=True)
            _download(url, path)
    return path


def _quote(url):
    """The official release tags begin with '#', which would cut the address off there."""
    return urllib.request.quote(url, safe="/:?&=%+@,;!$'()*~[]")


@contextlib.contextmanager
def _lock(path):
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with open(path, 'w') as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield


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


def _download(url, path):
    digest = hashlib.sha256()
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT) as answer, atomic_file(path) as f:
            expected = answer.headers.get('Content-Length')
            while chunk := answer.read(_CHUNK):
                if not f.tell():
                    _refuse_text(chunk, url)
                f.write(chunk)
                digest.update(chunk)
            size = f.tell()
            if not size or expected is not None and size != int(expected):
                raise UserError(f'the download of {url} broke off after {size} of '
                                f'{expected or "?"} bytes; nothing was kept, try again')
    except urllib.error.HTTPError as err:
        raise UserError(f'cannot download {url}: the server says {err.code} {err.reason}') from err
    except (OSError, http.client.HTTPException) as err:
        if getattr(err, 'filename', None) is not None:  # the disk, not the network
            raise
        raise UserError(f'cannot download {url}: {getattr(err, "reason", err)}. Fetch it on a '
                        'machine that can, and give the file in place of the address') from err
    record = dict(url=url, size=size, sha256=digest.hexdigest())
    write_atomic(json.dumps(record, indent=2).encode(), _record_of(path))
