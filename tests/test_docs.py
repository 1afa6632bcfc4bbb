"""What the Markdown files say of the repository: links, pictures, files, make targets, options.

``make docs`` checks the links between the pages of the site; here are also the files that are read
on their own, such as README.md, and what no site generator knows.
"""

import ast
import re
from pathlib import Path

import pytest

from vmamba_mm.families import FAMILIES

REPO = Path(__file__).resolve().parents[1]
PAGES = sorted(path for folder in ('.', 'docs', 'configs', 'kernels', 'vmamba_mm')
               for path in (REPO.glob('*.md') if folder == '.' else (REPO / folder).rglob('*.md')))
#: Its old entries name files as they were called at the time.
JOURNAL = REPO / 'docs' / 'kernels-journal.md'
PICTURES = sorted((REPO / 'docs').rglob('*.png'))


def name(path):
    return path.relative_to(REPO).as_posix()


def without_code(text):
    return re.sub(r'```.*?```|`[^`\n]*`', '', text, flags=re.DOTALL)


def headings(path):
    """The anchors of a page's headings, as GitHub and the site make them."""
    text = path.read_text()
    for included in re.findall(r'^```{include} (\S+)', text, re.MULTILINE):
        text += (path.parent / included).read_text()
    text = re.sub(r'```.*?```', '', text, flags=re.DOTALL)
    titles = re.findall(r'^#+ (.+)$', text, re.MULTILINE)
    return {re.sub(r'[^\w\- ]', '', title.lower()).replace(' ', '-') for title in titles}


def links(path):
    return re.findall(r'\]\(([^)\s]+)\)', without_code(path.read_text()))


@pytest.mark.parametrize('page', PAGES, ids=name)
def test_links_lead_somewhere(page):
    for link in links(page):
        if link.startswith(('http://', 'https://')):
            continue
        file, _, anchor = link.partition('#')
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), f'{name(page)} links to {link}'
        if anchor:
            assert anchor in headings(target), f'{name(page)} links to {link}'


def test_every_picture_is_shown():
    shown = {(page.parent / link).resolve() for page in PAGES for link in links(page)}
    assert PICTURES and not [name(p) for p in PICTURES if p not in shown]


@pytest.mark.parametrize('family', FAMILIES.values(), ids=FAMILIES)
def test_page_of_a_family_names_the_licence(family):
    """Its README says under which licence its authors released code and weights, or that none is
    stated, and where."""
    text = (REPO / 'configs' / (family.system or family.name) / 'README.md').read_text()
    licence = family.licence.partition(',')[0]
    assert licence and ('has no licence' if licence == 'none stated' else licence) in text
    assert family.url in text


def test_readme_is_short():
    assert len((REPO / 'README.md').read_text().splitlines()) <= 170


@pytest.mark.parametrize('page', [p for p in PAGES if p != JOURNAL], ids=name)
def test_files_and_targets_exist(page):
    text = page.read_text()
    paths = re.findall(r'(?<![\w/.:<>-])((?:tools|tests|configs|kernels|docs|vmamba_mm)/[\w./-]+\.'
                       r'(?:py|sh|cuh?|md|yml|json|png))\b', text)
    missing = [p for p in paths if 'NAME' not in p and not (REPO / p).exists()]
    assert not missing, f'{name(page)} names {missing}'
    rules = set(re.findall(r'^([\w-]+):', (REPO / 'Makefile').read_text(), re.MULTILINE))
    targets = re.findall(r'(?:^ {4}|`)make ([a-z][\w-]*)', text, re.MULTILINE)
    assert set(targets) <= rules, f'{name(page)} names {set(targets) - rules}'


@pytest.mark.parametrize('page', [p for p in PAGES if p != JOURNAL], ids=name)
def test_options_of_the_tools_exist(page):
    """Every ``--option`` of a command ``python tools/...`` stands in the tools' sources."""
    known = "'--help'" + ''.join(p.read_text() for p in (*(REPO / 'tools').rglob('*.py'),
                                                        *(REPO / 'vmamba_mm').rglob('*.py')))
    text = page.read_text().replace('\\\n', ' ')
    for command in re.findall(r'(?:^ {4}|`)(?:python )?tools/[\w/]+\.(?:py|sh)[^`\n]*', text,
                              re.MULTILINE):
        for option in re.findall(r' (--[a-z][\w-]*)', command):
            assert f"'{option}'" in known, f'{name(page)}: {command.strip()}'


@pytest.mark.parametrize('page', PAGES, ids=name)
def test_examples_are_python(page):
    for example in re.findall(r'```python\n(.*?)```', page.read_text(), re.DOTALL):
        for node in ast.walk(ast.parse(example)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith('vmamba_mm'):
                module = __import__(node.module, fromlist=['*'])
                for alias in node.names:
                    assert hasattr(module, alias.name), f'{name(page)}: {alias.name}'


@pytest.mark.parametrize('page', ['families', 'models', 'layers', 'ops'])
def test_examples_of_the_api_pages_run(page):
    examples = re.findall(r'```python\n(.*?)```', (REPO / f'docs/api/{page}.md').read_text(),
                          re.DOTALL)
    assert examples
    for example in examples:
        exec(example, {})


def test_page_of_the_ops_has_them_all():
    text = (REPO / 'docs' / 'ops.md').read_text()
    included = re.findall(r'^```{include} \.\./(\S+)', text, re.MULTILINE)
    assert sorted(included) == sorted(map(name, (REPO / 'vmamba_mm' / 'ops').rglob('README.md')))


def test_kernels_are_described():
    """kernels/README.md names every source, and nothing else."""
    text = (REPO / 'kernels' / 'README.md').read_text()
    named = set(re.findall(r'`(\w+\.cu)`', text))
    assert named == {path.name for path in (REPO / 'kernels').rglob('*.cu')}
