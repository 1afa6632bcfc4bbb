"""What was published of each family: models, weights, numbers, configs.

``configs/<family>/metafile.yml`` is the only home of these facts, in the form of OpenMMLab's model
index (Collections and Models). Everything else that names a published file or number reads it here:
weights by name, the names of timm and mmpretrain, the tables of ``tools/tables.py``, the messages
that say which config fits a file.
"""

import difflib
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from vmamba_mm.errors import UserError
from vmamba_mm.paths import CONFIGS

#: Before a name of :func:`find`, in place of the address of a checkpoint.
SCHEME = 'vmamba_mm://'
#: Tasks as the model index calls them -> as ``tools/`` and the checkpoints do.
TASKS = {'Image Classification': 'cls', 'Action Recognition': 'video', 'Object Detection': 'det',
         'Instance Segmentation': 'det', 'Semantic Segmentation': 'seg',
         'Change Detection': 'seg',
         'Masked Pre-training': 'pretrain', 'Multi-Instance Retrieval': 'pretrain',
         'Text-to-Video Retrieval': 'pretrain', 'Language Modelling': 'lm',
         'Medical Segmentation': 'medical', 'Image Generation': 'diffusion',
         'Point Cloud Classification': 'points', 'Part Segmentation': 'points',
         'Super-Resolution': 'sr', 'Image Denoising': 'denoise', 'JPEG Artefact Removal': 'jpeg'}
#: Those of whole networks from image to image.
RESTORATION = ('sr', 'denoise', 'jpeg')


@dataclass(frozen=True)
class Result:
    """A published result of a model on one task: ``metrics`` by their names, in percent where they
    are shares; PSNR in dB, and SSIM from 0 to 1."""

    task: str
    dataset: str
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Entry:
    """One published model.

    Attributes:
        name: unique in the zoo: that of its config, unless two files share one.
        family: that of the model.
        arch: a published architecture of the family.
        task: 'cls', 'video', 'det', 'seg', 'lm', 'points' of clouds, 'medical' of networks that
            nnU-Net trains, 'diffusion' of images made from noise, one of ``RESTORATION``, or
            'pretrain' of a file that a fine-tuning starts from: a value of :data:`TASKS`.
        folder: in ``configs/``, of the family's name, unless several families share it.
        config: ``configs/<folder>/NAME.py``, relative to the repository; see ``path``. None where
            there is no recipe.
        root: the folder that ``config`` is relative to.
        weights: the address of the file, or None where it was not published.
        sha256: of that file, where it is known.
        held_as: which set of weights of a file that holds two has the published numbers, 'model'
            or 'model_ema'; None for the averaged ones where they are present.
        parameters: a count; exact for classifiers, as rounded by the authors for the others.
        flops: of one image of the size in the paper, where a multiply-add counts once.
        results: as published, one for each task and data set; ``metrics`` may be empty.
        tag: tells the weights of one architecture apart, as timm's names do
            (``vmamba_tiny_s1l8.in1k``); None for detectors and segmentors.
        pretrained: what it started from, as ``family/arch.tag``; None for random weights.
        metadata: all that the metafile has under 'Metadata', with what the collection has there.
        collection: what the models of one paper and task share: 'Name', 'Metadata', 'Paper',
            'Code' and so on.
    """

    name: str
    family: str
    arch: str
    task: str
    folder: str
    config: str | None
    root: Path
    weights: str | None
    sha256: str | None
    held_as: str | None
    parameters: int | None
    flops: int | None
    results: tuple[Result, ...]
    tag: str | None
    pretrained: str | None
    metadata: Mapping[str, Any]
    collection: Mapping[str, Any]

    @property
    def path(self) -> Path | None:
        """The path of the config, in a checkout as in an installed package; None without one."""
        return None if self.config is None else self.root / self.config

    @property
    def metrics(self) -> dict[str, float]:
        """All published numbers; those of several data sets have the data set in their names."""
        several = len({result.dataset for result in self.results}) > 1
        return {f'{result.dataset} {name}' if several else name: value
                for result in self.results for name, value in result.metrics.items()}

    @property
    def dataset(self) -> str:
        """The first data set that it was measured on."""
        return self.results[0].dataset

    @property
    def source(self) -> str:
        """``vmamba_mm://`` and a name of :func:`find`, for whatever takes a checkpoint."""
        return SCHEME + (f'{self.family}/{self.arch}.{self.tag}' if self.tag else self.name)


def entries(family: str | None = None, arch: str | None = None,
            task: str | None = None) -> list[Entry]:
    """The published models, in the order of the metafiles; each argument leaves only its own."""
    return [e for e in _all_entries() if family in (None, e.family) and arch in (None, e.arch)
            and task in (None, e.task)]


def config_for(family: str, arch: str, task: str) -> str | None:
    """The config of the first published model of this kind, relative to the repository."""
    return next((e.config for e in entries(family, arch, task)), None)


def find(name: str) -> Entry:
    """The published model of a name.

    Args:
        name: an entry's, such as 'vmamba-tiny-s1l8_8xb128_in1k-224', or 'family/arch' for the
            first published classifier (or language model) of an architecture, or
            'family/arch.tag' for another.

    Raises:
        UserError: if there is none, with the names that are like it.
    """
    names = _by_name()
    if name not in names:
        near = difflib.get_close_matches(name, names, 3) or [n for n in names if '/' in n][:3]
        raise UserError(f'the zoo has no {name!r}; names are for example '
                        f'{", ".join(map(repr, near))} (vmamba_mm.zoo.entries() has all)')
    return names[name]


def weights_of(source: str) -> str:
    """The address of published weights, of ``vmamba_mm://NAME``.

    Raises:
        UserError: if the zoo has no such name, or nothing was published under it.
    """
    entry = find(source.removeprefix(SCHEME))
    if entry.weights is None:
        raise UserError(f'{source}: the weights of {entry.name} were not published')
    return entry.weights


def published_at(source: str) -> Entry | None:
    """The model that was published as ``vmamba_mm://NAME``, or at an address."""
    if source.startswith(SCHEME):
        return find(source.removeprefix(SCHEME))
    return next((e for e in _all_entries() if e.weights == source), None)


def published_sha256(address: str) -> str | None:
    """The SHA-256 of the file at an address, in hexadecimal, if the zoo knows it."""
    return next((e.sha256 for e in _all_entries() if e.weights == address), None)


def read_metafile(path: Path) -> list[Entry]:
    """The entries of one ``<root>/configs/<family>/metafile.yml``.

    Raises:
        UserError: if it lacks something or has what the zoo does not know, with file and model.
    """
    # libyaml's loader is ten times as fast; not every build of PyYAML has it.
    loader = getattr(yaml, 'CSafeLoader', yaml.SafeLoader)
    content = yaml.load(path.read_text(encoding='utf-8'), loader)
    collections = {c['Name']: c for c in content['Collections']}
    entries = []
    for model in content['Models']:
        try:
            entries.append(_read_entry(model, collections, path))
        except KeyError as err:
            raise UserError(f'{path}: {model.get("Name", "a model without a name")} lacks {err}, '
                            'or names what is not there') from err
    return entries


def register_configs(folder: Path) -> None:
    """Let the metafile of a folder outside the package, a family of your own, join the zoo.

    Args:
        folder: ``<root>/configs/<family>``; paths in its metafile are relative to the root.
    """
    _outside.append(Path(folder) / 'metafile.yml')
    _forget()


def unregister_configs(folder: Path) -> None:
    """Undo :func:`register_configs`."""
    _outside.remove(Path(folder) / 'metafile.yml')
    _forget()


def _forget() -> None:
    _all_entries.cache_clear()
    _by_name.cache_clear()


_outside: list[Path] = []


@functools.cache
def _all_entries() -> tuple[Entry, ...]:
    paths = [*sorted(CONFIGS.glob('*/metafile.yml')), *_outside]
    return tuple(entry for path in paths for entry in read_metafile(path))


@functools.cache
def _by_name() -> dict[str, Entry]:
    names: dict[str, Entry] = {}
    for e in _all_entries():
        if e.name in names:
            raise UserError(f'the zoo has two models called {e.name!r}')
        names[e.name] = e
        if e.tag:
            names.setdefault(f'{e.family}/{e.arch}', e)
            names[f'{e.family}/{e.arch}.{e.tag}'] = e
    return names


def _read_entry(model: Mapping[str, Any], collections: Mapping[str, Any], path: Path) -> Entry:
    collection = collections[model['In Collection']]
    metadata = {**collection.get('Metadata', {}), **model['Metadata']}
    results = tuple(Result(r['Task'], r['Dataset'], r['Metrics']) for r in model['Results'])
    tasks = {TASKS[result.task] for result in results}
    if len(tasks) != 1:
        raise UserError(f'{path}: {model["Name"]} has results of several tasks, {sorted(tasks)}')
    # 'FAMILY/ARCH' where several families share the folder.
    family, _, arch = metadata['Arch'].rpartition('/')
    return Entry(
        name=model['Name'], family=family or path.parent.name, arch=arch, task=tasks.pop(),
        folder=path.parent.name, config=model.get('Config'), root=path.parents[2],
        weights=model.get('Weights'),
        sha256=metadata.get('SHA-256'), held_as=metadata.get('Held As'),
        parameters=metadata.get('Parameters'),
        flops=metadata.get('FLOPs'), results=results, tag=metadata.get('Tag'),
        pretrained=metadata.get('Pretrained'), metadata=metadata, collection=collection)
