"""Write the tables of published models into the documentation, from the metafiles of configs/.

A Markdown file has a table's place between two comments, `<!-- table: NAME -->` and `<!-- end -->`:

  models          one row for each family: the best that was published (README.md)
  architectures   one row for each architecture, a table for each family (docs/)
  licences        one row for each family: the licence of the official code and weights (docs/)
  FAMILY/TASK     every published file, such as vmamba/det (configs/FAMILY/README.md)

model-index.yml, which lists the metafiles, is written as a whole.
"""

import argparse
import os
import re
import sys
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

from vmamba_mm import zoo
from vmamba_mm.atomic import write_atomic
from vmamba_mm.errors import UserError
from vmamba_mm.families import FAMILIES

ROOT = Path(__file__).resolve().parents[1]
PLACE = re.compile(r'(<!-- table: (.*?) -->\n)(.*?)(<!-- end -->)', re.DOTALL)
OPENING = re.compile(r'^<!-- table: ', re.MULTILINE)
#: Names of metrics in running text.
SHORT = {'Top 1 Accuracy': 'top-1'}


# --- the tables -----------------------------------------------------------------------------------

def table_of_models(folder: Path) -> str:
    """One row for each family: the best of each of its collections, by the first metric."""
    rows = []
    for _, models in by_family():
        best = [max(group, key=main_metrics) for group in by_collection(measured(models))]
        cells = '; '.join(f'{e.dataset}{method(e)}: ' + ', '.join(
            f'{SHORT.get(name, name)} {number(one, e)}' for name, one in main_metrics(e).items())
            + f' (`{e.arch}`)' for e in best)
        cells = cells or f'none listed; {names_of_archs(models)}'
        rows.append([title(models), cells,
                     link(f'configs/{models[0].folder}', folder,
                          f'configs/{models[0].folder}/README.md')])
    return table(['Family', 'Best published results', 'Configs'], rows)


def table_of_architectures(folder: Path) -> str:
    """A table for each family: parameters, FLOPs and the first published row of each task."""
    tables = []
    for _, models in by_family():
        models = measured(models) or models
        collections = list(by_collection(measured(models)))
        heads = [f'{group[0].dataset}{method(group[0])}{schedule(group)}: ' + ' / '.join(
            SHORT.get(name, name) for name in main_metrics(group[0])) for group in collections]
        rows = []
        for arch in dict.fromkeys(e.arch for e in models):
            of_arch = [next((e for e in group if e.arch == arch), None) for group in collections]
            size = next(e for e in models if e.arch == arch)
            rows.append([f'`{arch}`', *sizes(size), *(
                ' / '.join(number(v, e) for v in main_metrics(e).values()) if e else ''
                for e in of_arch)])
        tables.append(f'{title(models)}, `configs/{models[0].folder}`:\n\n' + table(
            *without_empty(['Architecture', 'Parameters', 'FLOPs', *heads], rows)))
    return '\n'.join(tables)


def table_of_licences() -> str:
    """One row for each family: the licence of what its authors released, and where that is."""
    rows = []
    for name, models in by_family():
        places = dict.fromkeys(e.collection['Code']['URL'] for e in models)
        rows.append([title(models), FAMILIES[name].licence, ', '.join(
            f'[{url.removeprefix("https://github.com/")}]({url})' for url in places)])
    return table(['Family', 'Licence of the official code and weights', 'Repository'], rows)


def table_of_files(models: Sequence[zoo.Entry], folder: Path) -> str:
    """Every published file of a family and a task."""
    metrics = list(dict.fromkeys(name for e in models for name in e.metrics))
    rows = [[link(e.name, folder, e.config) if e.config else e.name,
             *(number(e.metrics.get(m), e) for m in metrics), *sizes(e),
             f'[{e.weights.rpartition("/")[2]}]({e.weights})' if e.weights else '']
            for e in models]
    first = 'Config' if any(e.config for e in models) else 'Model'
    return table(*without_empty([first, *metrics, 'Parameters', 'FLOPs', 'Weights'], rows))


def names_of_archs(models: Sequence[zoo.Entry]) -> str:
    """All of them, or the first and the last of many."""
    names = [f'`{arch}`' for arch in dict.fromkeys(e.arch for e in models)]
    return ', '.join(names) if len(names) <= 8 else \
        f'{len(names)} architectures from {names[0]} to {names[-1]}'


def model_index() -> str:
    folders = dict.fromkeys(e.folder for e in zoo.entries())
    return 'Import:\n' + ''.join(f'  - configs/{folder}/metafile.yml\n' for folder in folders)


def by_family() -> Iterator[tuple[str, list[zoo.Entry]]]:
    for family, models in groupby(zoo.entries(), key=lambda e: e.family):
        yield family, list(models)


def measured(models: Sequence[zoo.Entry]) -> list[zoo.Entry]:
    """Those with results, which a pre-training alone has not."""
    return [e for e in models if e.metrics]


def by_collection(models: Sequence[zoo.Entry]) -> Iterator[list[zoo.Entry]]:
    for _, group in groupby(models, key=lambda e: e.collection['Name']):
        yield list(group)


class Metrics(dict):
    """Metrics that compare by their first."""

    def __gt__(self, other):
        return next(iter(self.values())) > next(iter(other.values()))


def main_metrics(entry: zoo.Entry) -> dict[str, float]:
    """The first metric of each result: box AP and mask AP of a detector. Of several data sets with
    the same metric, the first one's."""
    metrics = Metrics()
    for name, value in (next(iter(r.metrics.items())) for r in entry.results if r.metrics):
        metrics.setdefault(name, value)
    return metrics


def method(entry: zoo.Entry) -> str:
    """The collection's name without that of its family: ', Mask R-CNN' or nothing.

    A name that is the data set's says nothing more.
    """
    name = entry.collection['Name'].removeprefix(entry.collection['Family']).strip()
    return '' if name in ('', entry.dataset) else f', {name}'


def schedule(models: Sequence[zoo.Entry]) -> str:
    """The first one's number of epochs, if it tells the models of a collection apart."""
    epochs = [e.metadata.get('Epochs') for e in models]
    return f', {epochs[0]} epochs' if len(set(epochs)) > 1 else ''


def title(models: Sequence[zoo.Entry]) -> str:
    """What a family's collections call it, usually one name, with the first paper of each."""
    links = {}
    for entry in models:
        links.setdefault(entry.collection['Family'], entry.collection['Paper']['URL'])
    return ' and '.join(f'[{name}]({url})' for name, url in links.items())


def sizes(entry: zoo.Entry) -> list[str]:
    return ['' if entry.parameters is None else f'{entry.parameters / 1e6:.0f} M',
            '' if entry.flops is None else f'{entry.flops / 1e9:g} G']


def number(value: float | None, entry: zoo.Entry) -> str:
    """A result of an entry, and what its training had that others have not, such as MESA."""
    extra = entry.metadata.get('Trained With')
    return '' if value is None else f'{value} (with {extra})' if extra else str(value)


def link(text: str, folder: Path, target: str) -> str:
    """A link that works from a file in ``folder``."""
    return f'[{text}]({os.path.relpath(ROOT / target, folder).replace(os.sep, "/")})'


def without_empty(head: Sequence[str], rows: Sequence[Sequence[str]]
                  ) -> tuple[list[str], list[list[str]]]:
    """The columns that have anything in them."""
    kept = [i for i in range(len(head)) if any(row[i] for row in rows)]
    return [head[i] for i in kept], [[row[i] for i in kept] for row in rows]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f'| {" | ".join(line)} |\n' for line in (head, *rows)]
    return lines[0] + '|---' * len(head) + '|\n' + ''.join(lines[1:])


# --- the files ------------------------------------------------------------------------------------

def fill(path: Path) -> str:
    """The text of a Markdown file with its tables as they should be."""
    text = path.read_text(encoding='utf-8')
    if len(OPENING.findall(text)) != len(PLACE.findall(text)):
        raise UserError(f'{path}: a <!-- table: NAME --> has no <!-- end --> after it')
    return PLACE.sub(lambda m: m[1] + find_table(m[2], path) + m[4], text)


def find_table(name: str, path: Path) -> str:
    """The table of a name, for a file at ``path``."""
    if name == 'models':
        return table_of_models(path.parent)
    if name == 'architectures':
        return table_of_architectures(path.parent)
    if name == 'licences':
        return table_of_licences()
    family, _, task = name.partition('/')
    models = zoo.entries(family, task=task)
    if not models:
        names = ['models', 'architectures', 'licences', *dict.fromkeys(
            f'{e.family}/{e.task}' for e in zoo.entries())]
        raise UserError(f'{path} has a place for the table {name!r}, which does not exist; choose '
                        f'one of {", ".join(names)}')
    return table_of_files(models, path.parent)


def check_places(texts: dict[Path, str]) -> None:
    """Every family's README must have a place for each of its tables."""
    for family, models in by_family():
        path = ROOT / 'configs' / models[0].folder / 'README.md'
        held = {m[1] for m in PLACE.findall(texts.get(path, ''))}
        for task in dict.fromkeys(e.task for e in models):
            if f'{family}/{task}' not in held:
                raise UserError(f'{path} has no place for its table: add the lines '
                                f'<!-- table: {family}/{task} --> and <!-- end -->')


def find_files() -> list[Path]:
    return [path for pattern in ('*.md', 'docs/**/*.md', 'configs/*/README.md')
            for path in sorted(ROOT.glob(pattern))]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--check', action='store_true',
                        help='write nothing; end with 1 if a file is not as it should be')
    args = parser.parse_args(argv)
    try:
        texts = {path: fill(path) for path in find_files()}
        check_places(texts)
    except UserError as err:
        print(f'error: {err}', file=sys.stderr)
        return 1
    texts[ROOT / 'model-index.yml'] = model_index()
    changed = [path for path, text in texts.items()
               if not path.is_file() or path.read_text(encoding='utf-8') != text]
    for path in changed:
        if args.check:
            print(f'error: {path.relative_to(ROOT)} differs from the metafiles: run make tables',
                  file=sys.stderr)
        else:
            write_atomic(texts[path].encode(), path)
            print(f'wrote {path.relative_to(ROOT)}')
    return int(args.check and bool(changed))


if __name__ == '__main__':
    sys.exit(main())
