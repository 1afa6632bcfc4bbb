"""Where the package has its configs and kernels: links to folders of the checkout, or folders."""

from pathlib import Path

_PACKAGE = Path(__file__).parent


def follow(link: Path) -> Path:
    """The folder that a link of the package means; an installed package has the folder itself.

    git writes a text file that holds the target instead (core.symlinks=false, the default on
    Windows).
    """
    return (link.parent / link.read_text().strip()).resolve() if link.is_file() else link


KERNELS = follow(_PACKAGE / 'kernels')
CONFIGS = follow(_PACKAGE / '.mim' / 'configs')
