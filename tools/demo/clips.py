"""Short videos of a digit that moves over a photograph, as mp4 files in a folder for each class.

The class is digit and direction. The digit is in the middle part of the picture when a clip is half
over, whatever its direction, and moves at one speed: so the frame in the middle of a clip tells the
digit and nothing of the direction.
"""
import av
import numpy as np
import scenes

DIRECTIONS = dict(left=(-1, 0), right=(1, 0), up=(0, -1), down=(0, 1))  # x, y


def class_names(digits):
    return [f'{scenes.CLASSES[digit]} {name}' for digit in digits for name in DIRECTIONS]


def draw_clip(rng, split, source, direction, settings):
    """The frames (T, size, size, 3) uint8 of one clip."""
    size, count = settings['clip_size'], settings['clip_frames']
    photo = scenes.background(rng, split, size)
    alpha = scenes.stamp(source, int(rng.integers(*settings['clip_tile'])), rng.uniform(-10, 10))
    colour, (height, width) = scenes.bright_colour(rng), alpha.shape
    way = rng.uniform(*settings['clip_way'])  # from the first frame to the last, in pixels
    # Anywhere in the middle, such that a digit going any way stays in the picture.
    x, y = (rng.uniform(way / 2, size - side - way / 2) for side in (width, height))
    frames = []
    for t in np.linspace(-0.5, 0.5, count):
        left, top = (round(start + step * way * t) for start, step in zip(
            (x, y), direction, strict=True))
        ink = np.zeros((size, size), np.float32)
        ink[top:top + height, left:left + width] = np.clip(alpha, 0, 1)
        frame = photo * (1 - 0.8 * scenes.shadow(ink)[..., None])
        frame += ink[..., None] * (colour - frame)
        frames.append(frame + rng.normal(0, 3, frame.shape))
    return np.clip(np.rint(frames), 0, 255).astype(np.uint8)


def write_clip(frames, path, rate):
    """An mp4 file, the same bytes each time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), 'w') as file:
        # Without zerolatency the threads that look ahead make another file each time.
        stream = file.add_stream('libx264', rate=rate, options=dict(
            crf='18', preset='veryfast', tune='zerolatency'))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt, stream.thread_count = 'yuv420p', 1
        for frame in frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format='rgb24')))
        file.mux(stream.encode())


def build(root, settings):
    """Every digit of a split is used equally often, in different directions."""
    labels = scenes.load_digits()[1]
    for which, (split, count) in enumerate(zip(('train', 'val'), settings['clips_per_class'],
                                               strict=True)):
        rng = np.random.default_rng([settings['seed'], 30 + which])
        ids = scenes.digit_ids(split)
        for digit in settings['clip_digits']:
            own = ids[labels[ids] == digit]
            for name, direction in DIRECTIONS.items():
                for number, source in enumerate(np.resize(rng.permutation(own), count)):
                    frames = draw_clip(rng, split, source, direction, settings)
                    write_clip(frames, root / split / f'{scenes.CLASSES[digit]} {name}'
                               / f'{number:04d}_{source:04d}.mp4', settings['clip_rate'])


def verify(root, settings, check):
    """Read everything back: the files, and where the digit of some of them goes."""
    labels = scenes.load_digits()[1]
    names, counts, seen = class_names(settings['clip_digits']), {}, {}
    shape = (settings['clip_frames'], settings['clip_size'], settings['clip_size'], 3)
    for split, count in zip(('train', 'val'), settings['clips_per_class'], strict=True):
        seen[split] = set()
        check(sorted(p.name for p in (root / split).iterdir()) == sorted(names), f'{split} classes')
        for name in names:
            files = sorted((root / split / name).iterdir())
            check(len(files) == count, f'{root / split / name} holds {len(files)} clips')
            digit, direction = name.split()
            for path in files:
                source = int(path.stem.split('_')[1])
                check(scenes.CLASSES[labels[source]] == digit, f'{path} is no {digit}')
                seen[split].add(source)
            frames = read_clip(files[0])
            check(frames.shape == shape, f'{files[0]}: {frames.shape}')
            check(way_of(frames) == direction, f'{files[0]} does not go {direction}')
        counts[split] = len(names) * count
    check(not seen['train'] & seen['val'], 'a digit is both in train and val')
    return counts


def read_clip(path):
    with av.open(str(path)) as file:
        return np.stack([frame.to_ndarray(format='rgb24') for frame in file.decode(video=0)])


def way_of(frames):
    """The direction from the digit in the first frame to that in the last.

    A digit has a channel of 230 or more, and a dimmed photograph none above 128.
    """
    first, last = (np.argwhere(frame.max(-1) > 180).mean(0) for frame in (frames[0], frames[-1]))
    y, x = last - first
    return max(DIRECTIONS, key=lambda name: np.dot(DIRECTIONS[name], (x, y)))
