"""Rows of measurements, one for each case: CSV files, tables of text and of Markdown.

A case is a NamedTuple of what was measured, a row a dict of its numbers, of the 'problem' that it
met ('' if none) and of the setting, such as device and version of torch, all of it text.
"""

import csv
import io
import math
from dataclasses import dataclass

import torch

from vmamba_mm.atomic import write_atomic
from vmamba_mm.errors import UserError

NAN = float('nan')


# --- files ----------------------------------------------------------------------------------

@dataclass(frozen=True)
class Sheet:
    """The parts of a row, and files of rows.

    Args:
        case: the class of the cases; it has a default for all but its first field.
        numbers, setting: the names of a row's numbers and of its setting.
    """

    case: type
    numbers: tuple[str, ...]
    setting: tuple[str, ...]

    def write(self, path, rows):
        """Write {case: row} as CSV."""
        text = io.StringIO()
        writer = csv.DictWriter(
            text, [*self.case._fields, *self.numbers, 'problem', *self.setting])
        writer.writeheader()
        writer.writerows({**case._asdict(), **row} for case, row in rows.items())
        write_atomic(text.getvalue().encode(), path)

    def read(self, path):
        """{case: row} of a file of :meth:`write`.

        Raises:
            UserError: if it is none.
        """
        rows = {}
        try:
            with open(path, newline='') as file:
                for line in csv.DictReader(file):
                    case = self.case(*(type(default)(line[name]) for name, default in
                                       self.case('')._asdict().items()))
                    rows[case] = {name: float(line[name]) for name in self.numbers}
                    rows[case] |= {name: line[name] for name in ('problem', *self.setting)}
        except (KeyError, ValueError, TypeError, csv.Error) as err:
            raise UserError(f'{path} is no CSV file of this tool: {err!r}') from err
        return rows

    def find_setting(self, rows):
        return find_setting(rows, self.setting)


def find_setting(rows, names):
    """The setting that all rows have.

    Raises:
        UserError: if they have several: their times do not compare.
    """
    values = {name: sorted({row[name] for row in rows.values()}) for name in names}
    differing = [f'{name} {" and ".join(v)}' for name, v in values.items() if len(v) > 1]
    if differing:
        raise UserError(f'rows of different settings do not compare: {"; ".join(differing)}')
    return {name: v[0] for name, v in values.items()}


def number(rows, case, name):
    return rows[case][name] if case in rows else NAN


def device_name(device):
    return torch.cuda.get_device_name() if device == 'cuda' else 'CPU'


def describe_tf32():
    words = {True: 'on', False: 'off'}
    return (f'TF32 {words[torch.backends.cudnn.allow_tf32]} in convolutions and '
            f'{words[torch.backends.cuda.matmul.allow_tf32]} in products')


# --- text -----------------------------------------------------------------------------------

def show(value, unit=''):
    """Three digits, or all that stand before the point; '-' for NaN."""
    if math.isnan(value):
        return '-'
    return (f'{value:.0f}' if value >= 100 else f'{value:.3g}') + unit


def show_in(style, value):
    """A value in a style of format(); '' for NaN."""
    return '' if math.isnan(value) else format(value, style)


def print_table(title, head, lines):
    """Text in the first column, numbers in the others; nothing without lines."""
    if not lines:
        return
    widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]
    print(f'\n{title}')
    for first, *rest in (head, *lines):
        cells = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        print('  '.join([first.ljust(widths[0]), *cells]).rstrip())


def print_problems(rows):
    """Cases that were not measured; the same problem of a model is told once."""
    problems = {}
    for case, row in rows.items():
        if row['problem']:
            problems.setdefault((case.model, row['problem']), []).append(case.what)
    if problems:
        print('\nNot measured')
    for (model, problem), cases in problems.items():
        everything = len(cases) == sum(case.model == model for case in rows)
        print(f'{model}: {problem}' + ('' if everything else f' ({"; ".join(cases)})'))


def markdown_table(head, lines):
    """Lines without a number are left out."""
    rows = [head, ['---'] * len(head), *(line for line in lines if any(
        cell not in ('', '-') for cell in line[1:]))]
    return '\n'.join(f'| {" | ".join(row)} |' for row in rows) + '\n'
