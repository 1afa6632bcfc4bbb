"""Made-up solids as clouds of points, in the folders and text files of ModelNet40.

Each is a mesh of random proportions, points on its surface, noise, a turn about the vertical axis
(y), and a side that was not seen. All are brought to one size, so that this tells nothing.

    <root>/modelnet40_shape_names.txt, modelnet40_train.txt, modelnet40_test.txt
    <root>/<class>/<class>_0000.txt                                  x, y, z of a point in each line
"""
import numpy as np

CLASSES = ('box', 'chair', 'cone', 'cylinder', 'ellipsoid', 'pyramid', 'table', 'torus')
#: Deviation of the noise, where the largest distance from the middle is 1.
NOISE = 0.02
#: Up to this share of the points is missing on one side.
MISSING = 0.2


# --- meshes: vertices (V, 3) and triangles (F, 3) -------------------------------------------------

def join(*meshes):
    vertices, faces, start = [], [], 0
    for points, triangles in meshes:
        vertices.append(points)
        faces.append(triangles + start)
        start += len(points)
    return np.concatenate(vertices), np.concatenate(faces)


def block(size, at=(0, 0, 0)):
    """A box of ``size`` (x, y, z) around ``at``."""
    corners = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)]) / 2
    quads = [(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)]
    faces = [triangle for a, b, c, d in quads for triangle in ((a, b, c), (a, c, d))]
    return corners * size + at, np.array(faces)


def turned(radii, heights, sides=32):
    """What a line of (radius, height) draws when it turns about the vertical axis."""
    angles = np.linspace(0, 2 * np.pi, sides, endpoint=False) + np.pi / 4
    rings = [np.stack([r * np.cos(angles), np.full(sides, h), r * np.sin(angles)], 1)
             for r, h in zip(radii, heights, strict=True)]
    return np.concatenate(rings), strips(len(rings), sides, is_closed=False)


def strips(rings, sides, is_closed):
    """The triangles between neighbouring rings of ``sides`` points; also of the last and first."""
    faces = []
    for i in range(rings if is_closed else rings - 1):
        for j in range(sides):
            a, b = i * sides + j, i * sides + (j + 1) % sides
            c, d = (n % (rings * sides) for n in (a + sides, b + sides))
            faces += [(a, b, c), (b, d, c)]
    return np.array(faces)


def make_torus(thickness, rings=32, sides=16):
    around, across = (np.linspace(0, 2 * np.pi, n, endpoint=False) for n in (rings, sides))
    radius = 1 + thickness * np.cos(across)
    points = [np.stack([radius * np.cos(a), thickness * np.sin(across), radius * np.sin(a)], 1)
              for a in around]
    return np.concatenate(points), strips(rings, sides, is_closed=True)


def make_mesh(rng, name):
    """A mesh of a class, of random proportions."""
    height, depth = rng.uniform(0.7, 1.6, 2)
    if name == 'box':
        return block((1, height, depth))
    if name == 'ellipsoid':
        steps = np.linspace(0, np.pi, 17)
        points, faces = turned(np.sin(steps), height * np.cos(steps))
        return points * (1, 1, depth), faces
    if name == 'torus':
        return make_torus(rng.uniform(0.2, 0.45))
    if name in ('cone', 'pyramid', 'cylinder'):
        top = 1 if name == 'cylinder' else 0
        return turned((0, 1, top, 0), (0, 0, 1.6 * height, 1.6 * height),
                      4 if name == 'pyramid' else 32)
    legs = [block((0.12, height, 0.12), (x, -height / 2, z * depth))
            for x in (-0.44, 0.44) for z in (-0.44, 0.44)]
    seat = block((1, 0.1, depth))
    if name == 'table':
        return join(seat, *legs)
    return join(seat, *legs, block((0.1, 0.9 * height, depth), (0.45, 0.45 * height, 0)))


# --- clouds ---------------------------------------------------------------------------------------

def sample_surface(rng, mesh, count):
    """Points on a mesh, as many for each unit of its surface."""
    vertices, faces = mesh
    a, b, c = (vertices[faces[:, i]] for i in range(3))
    areas = np.linalg.norm(np.cross(b - a, c - a), axis=1)
    chosen = rng.choice(len(faces), count, p=areas / areas.sum())
    u, v = rng.random((2, count, 1))
    u, v = np.where(u + v > 1, 1 - u, u), np.where(u + v > 1, 1 - v, v)
    return a[chosen] + u * (b - a)[chosen] + v * (c - a)[chosen]


def draw_cloud(rng, name, count):
    """A cloud (count, 3) in fp32 of a class, in the unit sphere."""
    points = sample_surface(rng, make_mesh(rng, name), 2 * count)
    way = rng.normal(size=3)
    away = points @ way
    seen = points[away >= np.quantile(away, rng.uniform(0, MISSING))]
    points = seen[rng.choice(len(seen), count, replace=False)]
    angle = rng.uniform(0, 2 * np.pi)
    cos, sin = np.cos(angle), np.sin(angle)
    points = points @ np.array([[cos, 0, sin], [0, 1, 0], [-sin, 0, cos]])
    points = points - points.mean(0)
    points = points / np.linalg.norm(points, axis=1).max()
    return (points + rng.normal(0, NOISE, points.shape)).astype(np.float32)


def build(root, settings):
    root.mkdir(parents=True)
    (root / 'modelnet40_shape_names.txt').write_text('\n'.join(CLASSES) + '\n')
    for which, (split, count) in enumerate(zip(('train', 'test'), settings['shapes_per_class'],
                                               strict=True)):
        rng, names = np.random.default_rng([settings['seed'], 60 + which]), []
        for kind in CLASSES:
            (root / kind).mkdir(exist_ok=True)
            for number in range(count):
                names.append(f'{kind}_{split}{number:04d}')
                cloud = draw_cloud(rng, kind, settings['shape_points'])
                np.savetxt(root / kind / f'{names[-1]}.txt', cloud, fmt='%.4f', delimiter=',')
        (root / f'modelnet40_{split}.txt').write_text('\n'.join(names) + '\n')


def list_clouds(root, split):
    """The names of a split, and the number of the class of each."""
    names = (root / f'modelnet40_{split}.txt').read_text().split()
    return names, np.array([CLASSES.index(name.rpartition('_')[0]) for name in names])


def read_cloud(root, name):
    """(N, 3)"""
    return np.loadtxt(root / name.rpartition('_')[0] / f'{name}.txt', delimiter=',')


def verify(root, settings, check):
    """Read everything back; no cloud is twice there."""
    counts, seen = {}, set()
    for split, count in zip(('train', 'test'), settings['shapes_per_class'], strict=True):
        names, labels = list_clouds(root, split)
        check(np.bincount(labels).tolist() == [count] * len(CLASSES), f'{split}: labels')
        for name in names:
            cloud = read_cloud(root, name)
            check(cloud.shape == (settings['shape_points'], 3), f'{name}: {cloud.shape}')
            check(0.5 < np.linalg.norm(cloud, axis=1).max() < 1.5, f'{name}: size')
            seen.add(cloud.tobytes())
        counts[split] = len(names)
    check(len(seen) == sum(counts.values()), 'a cloud is there twice')
    return counts
