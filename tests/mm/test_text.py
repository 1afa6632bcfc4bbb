"""Names in pictures: fonts that have their letters, escapes where there is none."""

import warnings

import matplotlib
import pytest
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from vmamba_mm.mm import text

CAT, NEW = '\u732b', '\u0378'  # a Chinese letter, and one that no font has: it is not assigned


@pytest.fixture(autouse=True)
def no_fonts(monkeypatch):
    """A machine whose fonts are matplotlib's own; nothing was looked up before."""
    monkeypatch.setattr(font_manager, 'findSystemFonts', list)
    text.forget()
    with matplotlib.rc_context({'font.family': ['sans-serif'], 'font.sans-serif': ['DejaVu Sans']}):
        yield
    text.forget()


@pytest.fixture
def font(tmp_path, monkeypatch):
    """A font with one letter, newly installed."""
    from fontTools.fontBuilder import FontBuilder
    from fontTools.pens.ttGlyphPen import TTGlyphPen

    pen = TTGlyphPen(None)
    pen.moveTo((100, 0))
    pen.lineTo((100, 800))
    pen.lineTo((800, 0))
    pen.closePath()
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder(['.notdef', 'cat'])
    builder.setupCharacterMap({ord(CAT): 'cat'})
    builder.setupGlyf({'.notdef': TTGlyphPen(None).glyph(), 'cat': pen.glyph()})
    builder.setupHorizontalMetrics({'.notdef': (1000, 0), 'cat': (1000, 100)})
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable(dict(familyName='Test Cat', styleName='Regular'))
    builder.setupOS2()
    builder.setupPost()
    builder.save(tmp_path / 'cat.ttf')
    broken = tmp_path / 'a-noto-broken.ttf'
    broken.write_bytes(b'no font')
    monkeypatch.setattr(font_manager, 'findSystemFonts',
                        lambda: [str(broken), str(tmp_path / 'cat.ttf')])
    installed = list(font_manager.fontManager.ttflist)
    yield
    font_manager.fontManager.ttflist[:] = installed


def draw(*names, family=None):
    """The pixels of a legend and a bar's text; a letter that is missing is an error."""
    figure = Figure()
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name in names:
        axes.plot([0, 1], label=name)
        axes.text(0, 0, name, **({'family': family} if family else {}))
    axes.set_title(names[0])
    axes.legend()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        canvas.draw()
    return bytes(canvas.buffer_rgba())


def test_letters_without_a_font_are_escaped_and_said_once(capsys):
    assert text.drawable('caf\u00e9 \u0416') == 'caf\u00e9 \u0416'
    assert capsys.readouterr().err == ''
    names = [text.drawable(name) for name in (f'{CAT} 1', f'{CAT}{NEW}', 'plain\ttext')]
    assert names == ['\\u732b 1', '\\u732b\\u0378', 'plain text']
    line, = capsys.readouterr().err.splitlines()
    assert CAT in line and '\\u732b' in line
    draw(*names)
    with pytest.raises(UserWarning, match='missing'):
        draw(CAT)


def test_a_font_that_has_the_letters_is_found(font, capsys):
    names = [text.drawable(f'{CAT} cat'), text.drawable(NEW)]
    assert names == [f'{CAT} cat', '\\u0378']
    assert matplotlib.rcParams['font.family'] == ['sans-serif', 'Test Cat']
    assert NEW in capsys.readouterr().err
    assert draw(*names) != draw('  cat', '\\u0378')
    draw(CAT, family=text.families('monospace'))


def test_what_is_no_letter():
    """Joiners and variation selectors go; dollar signs do not begin a formula."""
    assert text.drawable('a\ufe0fb\u200dc') in ('abc', 'a\ufe0fb\u200dc')
    draw(text.drawable('a\ufe0fb\u200dc'), text.drawable('from $5 to $_6'))
    assert text.ascii_only(f'{CAT} \u00e9') == '\\u732b \\xe9'
