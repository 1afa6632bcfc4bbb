"""Clouds of points as pictures, seen from the side and a little from above."""

import numpy as np
from PIL import Image, ImageDraw

SIDE = 300
#: From the first to the last, as of viridis.
COLOURS = np.array([(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)])


def seen(points, side=SIDE, turn=0.6, tilt=0.45):
    """Where points are in a picture, and how near they are.

    Args:
        points: (N, 3), about in the unit sphere, with y up.
        side: of the picture.
        turn, tilt: of the view, about the vertical and the horizontal axis.

    Returns:
        (N, 2) in pixels, and (N).
    """
    cos, sin = np.cos(turn), np.sin(turn)
    x, z = cos * points[:, 0] + sin * points[:, 2], cos * points[:, 2] - sin * points[:, 0]
    y, near = (np.cos(tilt) * points[:, 1] - np.sin(tilt) * z,
               np.sin(tilt) * points[:, 1] + np.cos(tilt) * z)
    place = np.stack([x, -y], 1) * side * 0.42 + side / 2
    return place, near


def blend(share):
    """A colour for a number from 0 to 1."""
    place = np.clip(share, 0, 1) * (len(COLOURS) - 1)
    low = min(int(place), len(COLOURS) - 2)
    mixed = COLOURS[low] + (place - low) * (COLOURS[low + 1] - COLOURS[low])
    return tuple(int(x) for x in mixed)


def draw_points(draw, points, side=SIDE, colours=None):
    """Draw points, the far ones first and smaller.

    Args:
        draw: Pillow's ``ImageDraw`` of the picture.
        points: (N, 3), as of :func:`seen`.
        side: of the square that they are drawn in.
        colours: (N, 3) from 0 to 255; None for colours by height.
    """
    place, near = seen(points, side)
    height = (points[:, 1] - points[:, 1].min()) / max(np.ptp(points[:, 1]), 1e-6)
    for i in np.argsort(near):
        radius = (2.5 + near[i]) * side / SIDE
        colour = blend(height[i]) if colours is None else tuple(int(c) for c in colours[i])
        draw.ellipse([*(place[i] - radius), *(place[i] + radius)], colour)


def picture_of(points, colours=None, side=500):
    """A cloud of any place and size as an image, (side, side, 3) uint8.

    Args:
        points: (N, C), x, y and z first.
        colours: as of :func:`draw_points`.
    """
    points = points[:, :3] - points[:, :3].mean(0)
    radius = np.linalg.norm(points, axis=1).max()
    page = Image.new('RGB', (side, side), 'white')
    draw_points(ImageDraw.Draw(page), points / max(radius, 1e-12), side, colours)
    return np.asarray(page)
