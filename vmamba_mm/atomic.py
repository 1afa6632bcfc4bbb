"""Files that are written whole or not at all."""

import contextlib
import os
from pathlib import Path

TEMP_SUFFIX = '.incomplete'


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike):
    """A binary file to write to; ``path`` holds the old content or all of the new, at any moment.

    Raises:
        OSError: with the path in it, for example when the disk is full; nothing is left behind.
    """
    path = Path(path)
    temp = path.with_name(f'.{path.name}.{os.getpid()}{TEMP_SUFFIX}')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temp, 'wb') as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temp, path)
        if hasattr(os, 'O_DIRECTORY'):  # the new name must survive a power cut as well
            folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except OSError as err:
        if type(err) is OSError and err.filename is None:
            err.filename = str(path)
        raise
    finally:
        temp.unlink(missing_ok=True)


def write_atomic(data: bytes, path: str | os.PathLike) -> None:
    """Write a file whole or not at all."""
    with atomic_file(path) as f:
        f.write(data)
