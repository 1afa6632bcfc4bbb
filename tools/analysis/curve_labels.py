"""Names beside the ends of curves, spread so that none covers another."""

import numpy as np


def spread(heights, gap):
    """The nearest heights to those given, in their order, that are ``gap`` apart or more."""
    order = np.argsort(heights, kind='stable')
    groups = []  # [the sum of the heights wished, the count]
    for height in np.asarray(heights, float)[order]:
        groups.append([height, 1])
        while len(groups) > 1 and _lowest(groups[-2], gap) + groups[-2][1] * gap \
                > _lowest(groups[-1], gap):
            total, count = groups.pop()
            groups[-1][0] += total
            groups[-1][1] += count
    sorted_heights = [_lowest(g, gap) + i * gap for g in groups for i in range(g[1])]
    spread_heights = np.empty(len(heights))
    spread_heights[order] = sorted_heights
    return spread_heights


def _lowest(group, gap):
    """The lowest height of a group of labels around the mean of what they label."""
    total, count = group
    return total / count - gap * (count - 1) / 2


def label_ends(ax, ends):
    """Names beside the last points of curves, spread so that none covers another.

    Args:
        ends: [(x, y, text, colour)], after all is drawn and scaled.
    """
    from vmamba_mm.mm.text import drawable

    if not ends:
        return
    ax.set_ylim(*ax.get_ylim())
    positions = [ax.transAxes.inverted().transform(ax.transData.transform((x, y)))
                 for x, y, *_ in ends]
    height = ax.figure.get_size_inches()[1] * ax.get_position().height * 72  # points
    gap = 13 / height  # 9 pt of text, in axes
    heights = spread([y for _, y in positions], gap)
    for (x, y, text, colour), height in zip(ends, heights, strict=True):
        ax.annotate(drawable(text), (x, y), xycoords='data', xytext=(1.03, height),
                    textcoords='axes fraction', color=colour, fontsize=9, va='center',
                    annotation_clip=False, arrowprops=dict(
                        arrowstyle='-', color=colour, linewidth=0.6, alpha=0.6, relpos=(0, 0.5),
                        shrinkA=1, shrinkB=4))
