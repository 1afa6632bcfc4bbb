"""The package's links to folders of the checkout, where git could not make symbolic ones."""

from pathlib import Path


def follow(link: Path) -> Path:
    """The folder that a link of the package means; an installed package has the folder itself.

    git writes a text file that holds the target instead (core.symlinks=false, the default on
    Windows).
    """
    return (link.parent / link.read_text().strip()).resolve() if link.is_file() else link
