"""What lies in a checkpoint file or folder, read without running its code."""

import contextlib
import json
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from vmamba_mm.errors import UserError

#: What Hugging Face's libraries call the weights in a folder, in the order of preference.
FOLDER_FILES = ('model.safetensors', 'model.safetensors.index.json', 'pytorch_model.bin',
                'pytorch_model.bin.index.json')
_SUFFIXES = ('.pth', '.pt', '.bin', '.ckpt', '.safetensors')
_ADVICE = 'save its weights alone, torch.save(model.state_dict(), FILE), where its code is at hand'


def read_content(path: Path, map_location: Any = 'cpu') -> Any:
    """All that a checkpoint holds, by the names of the file.

    Args:
        path: a file of torch.save or safetensors, the index of one in several parts, or a folder:
            of torch.distributed.checkpoint, or with one of ``FOLDER_FILES``.
        map_location: of ``torch.load``.

    Raises:
        UserError: if it is missing, broken, unsafe, a program or none of these formats.
    """
    if path.is_dir():
        if (path / '.metadata').is_file():
            return _read_distributed(path)
        return read_content(_find_in_folder(path), map_location)
    part = re.search(r'-(\d{5})-of-(\d{5})\.\w+$', path.name)
    if part and int(part[2]) > 1 and path.is_file():
        raise UserError(f'{path} is part {int(part[1])} of {int(part[2])} of a checkpoint: give '
                        'its folder, or the file that ends with .index.json')
    if path.suffix == '.distcp' or path.name == '.metadata':
        raise UserError(f'{path} is a part of a checkpoint of torch.distributed.checkpoint: give '
                        'its folder')
    kind = find_kind(path)
    if kind == 'index':
        return _read_parts(path, map_location)
    return _read_file(path, kind, map_location)


def find_parts(path: Path) -> tuple[list[Path], dict[str, str] | None] | None:
    """The files of weights that ``path`` stands for, and of an index which weight is in which.

    Args:
        path: as of :func:`read_content`.

    Returns:
        None of a folder of torch.distributed.checkpoint, which has no such files.

    Raises:
        UserError: if one is missing.
    """
    if path.is_dir():
        if (path / '.metadata').is_file():
            return None
        path = _find_in_folder(path)
    if find_kind(path) != 'index':
        return [path], None
    file_of = _read_index(path)
    return [_part(path, name) for name in sorted(set(file_of.values()))], file_of


def list_files(path: Path) -> list[Path]:
    """The files that :func:`read_content` reads, and whatever else lies in a folder of it."""
    if path.is_dir():
        return [p for p in path.iterdir() if p.is_file()]
    if path.name.endswith('.index.json') and path.is_file():
        return [path, *(path.with_name(name) for name in set(_read_index(path).values()))]
    return [path]


def _find_in_folder(path):
    for name in FOLDER_FILES:
        if (path / name).is_file():
            return path / name
    files = sorted(p.name for p in path.iterdir() if p.suffix in _SUFFIXES)
    raise UserError(f'the checkpoint {path} is a folder without .metadata, '
                    f'{", ".join(FOLDER_FILES)}'
                    + (f': name one of its files, {", ".join(files[:5])}' if files else ''))


def find_kind(path: Path) -> str:
    """'safetensors', 'index' or 'pickle' by the first bytes; one line for what is neither."""
    if not path.is_file():
        raise UserError(f'the checkpoint {path} does not exist')
    with open(path, 'rb') as f:
        start = f.read(512)
    refuse_text(start, path)
    if start[8:9] == b'{' and int.from_bytes(start[:8], 'little') < path.stat().st_size:
        return 'safetensors'
    return 'index' if start.lstrip().startswith(b'{') else 'pickle'


def refuse_text(start: bytes, name: Any) -> None:
    """Refuse a server's answer in place of the file.

    Args:
        start: the first bytes.
        name: of the file, for the message.
    """
    text = start.lstrip().lower()
    if not text:
        raise UserError(f'{name} is empty')
    if text.startswith((b'<!doctype', b'<html', b'<?xml')):
        raise UserError(f'{name} is a web page, not a checkpoint: the server answered with a page '
                        'in place of the file; download it again')
    if text.startswith(b'version https://git-lfs'):
        raise UserError(f'{name} is a pointer of Git LFS, not the file itself: run git lfs pull')


def _read_file(path, kind, map_location):
    return _read_safetensors(path) if kind == 'safetensors' else _read_pickle(path, map_location)


# --- safetensors, and weights in parts ----------------------------------------------------------

def _read_safetensors(path):
    with open_safetensors(path) as (f, meta):
        return dict(meta=meta, state_dict={k: f.get_tensor(k) for k in f.keys()})  # noqa: SIM118


@contextlib.contextmanager
def open_safetensors(path: Path) -> Iterator[tuple[Any, dict[str, Any]]]:
    """An open file of ``safetensors.safe_open``, and the 'meta' that convert_checkpoint.py wrote.

    Raises:
        UserError: if it cannot be read, then or inside the context.
    """
    try:
        from safetensors import safe_open
    except ImportError as err:
        raise UserError(f'{path} needs the package safetensors: pip install safetensors') from err
    try:
        with safe_open(path, 'pt') as f:
            yield f, _our_meta(f.metadata())
    except UserError:
        raise
    except Exception as err:
        raise _unreadable(path, err) from err


def _our_meta(metadata):
    """The 'meta' that convert_checkpoint.py writes; what others write there is none of ours."""
    try:
        meta = json.loads((metadata or {}).get('meta', '{}'))
    except ValueError:
        return {}
    return meta if isinstance(meta, dict) else {}


def _read_index(path):
    """{name of a weight: name of the file that holds it}"""
    try:
        index = json.loads(path.read_text(encoding='utf-8'))
        files = dict(index['weight_map'])
    except (KeyError, TypeError, ValueError) as err:
        raise UserError(f'{path} cannot be read as a checkpoint: it begins like the index of one '
                        'in several parts (JSON), and has no weight_map') from err
    for file in files.values():
        if not isinstance(file, str) or file in ('', '.', '..') or re.search(r'[/\\:]', file):
            raise UserError(f'{path} is not safe to load: it names the part {file!r}, which is '
                            'not beside it')
    return files


def _part(path, name):
    """The file ``name`` beside an index."""
    part_path = path.with_name(name)
    if not part_path.is_file():
        raise UserError(f'{path} is incomplete: its part {name} is missing')
    return part_path


def _read_parts(path, map_location):
    file_of = _read_index(path)
    state, meta = {}, {}
    for name in sorted(set(file_of.values())):
        part_path = _part(path, name)
        content = _read_file(part_path, find_kind(part_path), map_location)
        if isinstance(content, dict) and set(content) == {'meta', 'state_dict'}:
            meta, content = {**meta, **content['meta']}, content['state_dict']
        if not isinstance(content, dict):
            raise UserError(f'{part_path} holds a {type(content).__name__}, not weights')
        state.update(content)
    missing = sorted(set(file_of) - set(state))
    if missing:
        raise UserError(f'{path} is incomplete: {missing[0]} is not in {file_of[missing[0]]}')
    return dict(meta=meta, state_dict=state)


# --- torch.save -----------------------------------------------------------------------------------

def _read_pickle(path, map_location):
    names = []
    _refuse_program(path)
    try:
        if not zipfile.is_zipfile(path):  # written by torch < 1.6, or cut off
            return torch.load(path, map_location, weights_only=True)
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        with torch.serialization.safe_globals(_find_stand_ins(names)):
            return torch.load(path, map_location, weights_only=True, mmap=True)
    except UserError as err:
        hint = ''
        if any(name.startswith('torch.nn.modules.') for name in names):
            hint = f'; it holds pickled modules: if they are a whole model, {_ADVICE}'
        raise UserError(f'{path} is not safe to load: {err}{hint}') from err
    except Exception as err:
        text = str(err)
        if any(re.search('DTensor|DeviceMesh|ShardedTensor', t) for t in (text, *names)):
            raise UserError(f'{path} holds the share of one process (DTensor, ShardedTensor): save '
                            'the full state dict (get_model_state_dict of torch.distributed.'
                            'checkpoint.state_dict with full_state_dict=True), or give the folder '
                            'of torch.distributed.checkpoint') from err
        match = re.search(r'GLOBAL (\S+)', text)
        if match:
            raise UserError(f'{path} is not safe to load: it holds {match[1]}, which could run '
                            f'code; if that is a whole pickled model, {_ADVICE}') from err
        raise _unreadable(path, err) from err


def _refuse_program(path):
    """A model with its code, by the names of what lies in the archive."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        names = {name.partition('/')[2] or name for name in archive.namelist()}
    if 'constants.pkl' in names or any(n.startswith('code/') for n in names):
        kind = 'of TorchScript (torch.jit.save)'
    elif names & {'archive_format', 'serialized_exported_program.json', 'models/model.json'}:
        kind = 'of torch.export or AOTInductor (.pt2)'
    else:
        return
    raise UserError(f'{path} is a program {kind}, not a checkpoint: {_ADVICE}')


def _unreadable(path, err):
    reason = str(err).strip().partition('\n')[0] or type(err).__name__
    return UserError(f'{path} cannot be read as a checkpoint (incomplete, or not one): {reason}')


def _find_stand_ins(names):
    """[(what the pickle gets, name in it)] for names that torch.load refuses; none is imported."""
    numpy_types = safe_numpy_types()
    stand_ins = [(t, name) for name, t in numpy_types.items()]
    for name in names:
        if name not in numpy_types:
            stand_in = _getattr if name == 'builtins.getattr' else _Calls(name, (_Data,), {})
            stand_ins.append((stand_in, name))
    # safe_globals would remove at its end what was allowed before.
    allowed = torch.serialization.get_safe_globals()
    return [pair for pair in stand_ins if pair not in allowed]


#: Pickled as calls, often in hyper-parameters; not called either, and what they held is lost.
_HARMLESS = re.compile(r'functools\.partial|collections\.defaultdict|'
                       r'pathlib\.(?:_local\.)?(?:Pure)?(?:Posix|Windows)?Path')


class _Calls(type):
    """A class that can be instantiated by a pickle's NEWOBJ, which runs no code, and not called."""

    def __call__(cls, *args, **kwargs):
        if not _HARMLESS.fullmatch(cls.__name__):
            raise UserError(f'it calls {cls.__name__}, which could run code')
        return OrderedDict() if 'dict' in cls.__name__ else object.__new__(cls)


class _Data(metaclass=_Calls):
    """The plain data of an object whose class is not looked at, such as yacs' CfgNode."""

    def __new__(cls, *args):
        data = OrderedDict()
        data.__dict__['of_class'] = cls.__name__
        return data

    def __setstate__(self, state):
        """Ignore the state of what a call that was not made would have returned."""


def _getattr(owner, name):
    """mmengine's history pickles its own methods as getattr(HistoryBuffer, name)."""
    if not (isinstance(owner, _Calls) and owner.__name__.startswith('mmengine.')):
        raise UserError('it calls getattr, which could run code')
    return f'{owner.__name__}.{name}'


def refuse_module(content: dict, path: Any) -> None:
    """Refuse a whole pickled model in place of weights, or beside nothing that is weights."""
    class_name = _module_class(content)
    if class_name is None and not any(_is_state_dict(v) for v in (content, *content.values())):
        class_name = next(filter(None, map(_module_class, content.values())), None)
    if class_name is not None:
        raise UserError(f'{path} holds a whole pickled model ({class_name}), which only its own '
                        f'code can load, and code of a file is not run here: {_ADVICE}')


def _module_class(value):
    """The name of the class if the data are those of an nn.Module."""
    attributes = getattr(value, '__dict__', {})
    return attributes.get('of_class') if {'_parameters', '_modules'} <= set(attributes) else None


def _is_state_dict(value):
    return isinstance(value, dict) and any(isinstance(v, torch.Tensor) for v in value.values())


# --- torch.distributed.checkpoint -----------------------------------------------------------------

def _read_distributed(path):
    """The tensors of such a folder, but the optimizer's, whole, nested as they were saved."""
    from torch.distributed.checkpoint import CheckpointException, FileSystemReader
    from torch.distributed.checkpoint.metadata import StorageMeta, TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    class Reader(FileSystemReader):
        """torch's own reader unpickles whatever the folder's metadata hold."""

        def read_metadata(self, *args, **kwargs):
            with open(path / '.metadata', 'rb') as f:
                metadata = _MetadataUnpickler(f).load()
            metadata.storage_meta = getattr(metadata, 'storage_meta', None) or StorageMeta()
            return metadata

    try:
        reader = Reader(path)
        metadata = reader.read_metadata()
        key_paths = metadata.planner_data or {}
        tensors, content = {}, {}
        for name, entry in metadata.state_dict_metadata.items():
            # What is no tensor would be unpickled, code and all.
            if isinstance(entry, TensorStorageMetadata) and not name.startswith('optim'):
                tensors[name] = torch.empty(entry.size, dtype=entry.properties.dtype)
                *parents, last = key_paths.get(name, (name,))
                node = content
                for key in parents:
                    node = node.setdefault(key, {})
                node[last] = tensors[name]
        _load_state_dict(tensors, reader, no_dist=True)
    except UserError as err:
        raise UserError(f'{path} is not safe to load: {err}') from err
    except CheckpointException as err:  # of several processes; no Exception
        reason, _ = next(iter(err.failures.values()))
        raise _unreadable(path, reason) from err
    except Exception as err:
        raise _unreadable(path, err) from err
    return content


class _MetadataUnpickler(pickle.Unpickler):
    """Unpickles a folder's description: torch's own records, sizes, dtypes and plain values."""

    _RECORDS = {
        'torch.distributed.checkpoint.metadata': (
            'Metadata', 'MetadataIndex', 'StorageMeta', 'TensorStorageMetadata',
            'BytesStorageMetadata', 'ChunkStorageMetadata', 'TensorProperties',
            '_MEM_FORMAT_ENCODING'),
        'torch.distributed.checkpoint.filesystem': ('_StorageInfo',),
        'torch': ('Size',),
        'torch.serialization': ('_get_layout',),
        'collections': ('OrderedDict',),
    }

    def find_class(self, module, name):
        if module == 'torch' and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if module.partition('.')[0] == 'pathlib':
            return PurePosixPath
        if name not in self._RECORDS.get(module, ()):
            raise UserError(f'its .metadata hold {module}.{name}, which could run code')
        return super().find_class(module, name)


def safe_numpy_types():
    """{name in a pickle: numpy's type or function} of arrays and scalars, which run no code."""
    import numpy as np

    core = np._core if hasattr(np, '_core') else np.core
    dtypes = {type(np.dtype(name)) for name in
              ('bool', 'int8', 'int16', 'int32', 'int64', 'uint8', 'uint16', 'uint32', 'uint64',
               'float16', 'float32', 'float64', 'str', 'bytes')}
    types = {f'{t.__module__}.{t.__qualname__}': t for t in (np.ndarray, np.dtype, *dtypes)}
    for function in (core.multiarray._reconstruct, core.multiarray.scalar):
        # numpy 1 and 2 write different module names for the same two functions.
        for package in ('numpy.core', 'numpy._core'):
            types[f'{package}.multiarray.{function.__name__}'] = function
    return types
