"""One page of a demo run: the numbers, the curves and the predicted pictures."""
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

WIDTH, PAD = 1240, 20


def fitted(path, width):
    image = Image.open(path).convert('RGB')
    # Small pictures are enlarged by whole factors, so that their pixels stay visible.
    if image.width * 2 <= width:
        factor = width // image.width
        return image.resize((image.width * factor, image.height * factor), Image.NEAREST)
    return image.resize((width, round(image.height * width / image.width)), Image.LANCZOS)


def choose_columns(path):
    with Image.open(path) as image:
        if image.width > 2.5 * image.height:
            return 2
        return 3 if image.width > 1.5 * image.height or image.width > 400 else 4


def panel(image, labels, colours, title, scale=4):
    """An image (H, W, 3), enlarged, with classes in colour, and a title below."""
    image = image.astype(float)
    for label, colour in colours.items():
        where = labels == label
        image[where] = 0.4 * image[where] + 0.6 * np.array(colour)
    height, width = (side * scale for side in image.shape[:2])
    page = Image.new('RGB', (width, height + 26), 'white')
    page.paste(Image.fromarray(image.astype(np.uint8)).resize((width, height), Image.NEAREST))
    ImageDraw.Draw(page).text((4, height + 2), title, 'black', ImageFont.load_default(18))
    return page


def side_by_side(images, gap=8, vertical=False):
    axis = 1 if vertical else 0
    length = sum(image.size[axis] + gap for image in images) - gap
    across = max(image.size[1 - axis] for image in images)
    page = Image.new('RGB', (across, length) if vertical else (length, across), 'white')
    place = 0
    for image in images:
        page.paste(image, (0, place) if vertical else (place, 0))
        place += image.size[axis] + gap
    return page


def contact_sheet(path, title, lines, curves, folder, columns=None):
    """Write the page, with pictures in so many columns, and return its path."""
    files = [p for p in sorted(Path(folder).rglob('*')) if p.suffix.lower() in ('.png', '.jpg')]
    columns = columns or (choose_columns(files[0]) if files else 4)
    cell = (WIDTH - PAD * (columns + 1)) // columns
    pictures = [fitted(p, cell) for p in files]
    curve = [fitted(curves, WIDTH - 2 * PAD)] if Path(curves).is_file() else []
    rows = [pictures[i:i + columns] for i in range(0, len(pictures), columns)]
    head = PAD + 40 + 26 * len(lines) + PAD
    height = head + sum(c.height + PAD for c in curve)
    height += sum(max(p.height for p in row) + PAD for row in rows)

    page = Image.new('RGB', (WIDTH, height), 'white')
    draw = ImageDraw.Draw(page)
    draw.text((PAD, PAD), title, 'black', ImageFont.load_default(26))
    for i, line in enumerate(lines):
        draw.text((PAD, PAD + 40 + 26 * i), line, 'black', ImageFont.load_default(18))
    y = head
    for image in curve:
        page.paste(image, (PAD, y))
        y += image.height + PAD
    for row in rows:
        for i, picture in enumerate(row):
            page.paste(picture, (PAD + i * (cell + PAD), y))
        y += max(p.height for p in row) + PAD
    path = Path(path)
    page.save(path)
    return path
