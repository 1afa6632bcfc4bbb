"""Names to be drawn by matplotlib: fonts that have their letters, or escapes where none has."""

import sys
import unicodedata

_drawn, _lacking = {'\n'}, set()  # letters that were looked up


def drawable(text):
    """``text`` as matplotlib can draw it, without boxes and without meaning of its own.

    Fonts that have the letters which the default one lacks are looked for on this machine and
    become its fallbacks. What none has is written as an escape, such as ``\\u732b``, which is
    said once. Dollar signs begin no formula. Call this before the figure is made: axes keep the
    fonts that they begin with.
    """
    new = set(text) - _drawn - _lacking
    if new:
        _look_up(new)
    return ''.join(_escape(c) if c in _lacking else c for c in text).replace('$', r'\$')


def ascii_only(text):
    """``text`` for OpenCV, whose one font has no other letters: escapes in place of them."""
    return text.encode('ascii', 'backslashreplace').decode()


def families(*first):
    """The families that a text has to name, after its own, to be drawn with the fallbacks."""
    import matplotlib

    return [*first, *(f for f in matplotlib.rcParams['font.family'] if f not in first)]


def forget():
    """Look every letter up anew, for tests and for fonts that came since."""
    _drawn.clear()
    _drawn.add('\n')
    _lacking.clear()


def _look_up(letters):
    import matplotlib
    from matplotlib import font_manager

    manager = font_manager.fontManager
    used = matplotlib.rcParams['font.family']
    left = set(letters)
    for family in used:
        left -= _letters_of(manager.findfont(font_manager.FontProperties(family=[family])), left)
    # The manager's own list is of the day when it was made, and misses fonts installed since.
    for path in _candidates() if left else ():
        new_letters = _letters_of(path, left)
        if new_letters:
            manager.addfont(path)
            family = font_manager.get_font(path).family_name
            # Of the family another style may be chosen, which need not have them.
            chosen = manager.findfont(font_manager.FontProperties(family=[family]))
            new_letters = _letters_of(chosen, new_letters)
        if new_letters:
            matplotlib.rcParams['font.family'] = [*matplotlib.rcParams['font.family'], family]
            left -= new_letters
        if not left:
            break
    visible = sorted(c for c in left if _escape(c).strip())
    if visible and not any(_escape(c).strip() for c in _lacking):
        print(f'no font on this machine has {", ".join(visible[:5])}'
              f'{", ..." if len(visible) > 5 else ""}: drawn as {_escape(visible[0])}; with a font '
              'that has them, such as Noto Sans CJK, they are drawn as they are', file=sys.stderr)
    _lacking.update(left)
    _drawn.update(letters - left)


def _candidates():
    """Font files of this machine, those first that are known for many letters."""
    from matplotlib import font_manager

    known = ('cjk', 'unifont', 'unicode', 'noto', 'wqy', 'droid')
    paths = sorted(map(str, font_manager.findSystemFonts()))
    return sorted(paths, key=lambda p: next((i for i, name in enumerate(known)
                                             if name in p.rpartition('/')[2].lower()), len(known)))


def _letters_of(path, letters):
    """Those of the letters that a font file has and matplotlib can draw: not coloured pictures."""
    from matplotlib import font_manager

    try:
        font = font_manager.get_font(path)
        mapped = {c for c in letters if ord(c) in font.get_charmap()}
        font.set_size(12, 72)
        return {c for c in mapped if c.isspace() or font.load_char(ord(c)).width > 0}
    except Exception:  # of a broken file, or of a format that FreeType has no outlines of
        return set()


def _escape(letter):
    if letter.isspace():
        return ' '
    if unicodedata.category(letter) == 'Cf' or '\ufe00' <= letter <= '\ufe0f':
        return ''  # they only change how their neighbours look
    return letter.encode('unicode_escape').decode()
