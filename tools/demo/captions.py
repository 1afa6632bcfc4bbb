"""Digits on photographs, and captions of them, as the files of LLaVA have conversations.

    <root>/{train,val}/<number>.png, {train,val}.json

An item also has the digits from left to right, each as [class, x, y, width, height]. Validation has
digits and photographs that training never sees.
"""
import json

import numpy as np
import scenes
from PIL import Image

QUESTION = 'What is there?'


def caption(labels):
    """'a three and an eight on a photograph'"""
    names = [scenes.CLASSES[label] for label in labels]
    named = [f'{"an" if name == "eight" else "a"} {name}' for name in names]
    return f'{" and ".join(named)} on a photograph'


def build(root, settings):
    for which, split in enumerate(('train', 'val')):
        (root / split).mkdir(parents=True)
        rng = np.random.default_rng([settings['seed'], 90 + which])
        pool, items = scenes.digit_ids(split), []
        for number in range(settings['captions'][which]):
            sources = rng.choice(pool, rng.integers(1, 3), replace=False)
            image, digits, _ = scenes.make_scene(
                rng, split, settings['caption_size'], sources, settings['caption_tile'])
            digits.sort(key=lambda digit: 2 * digit.box[0] + digit.box[2])
            name = f'{split}/{number:05d}.png'
            Image.fromarray(image).save(root / name, compress_level=1)
            items.append(dict(
                id=f'{number:05d}', image=name, digits=[[d.label, *d.box] for d in digits],
                sources=[d.source for d in digits],
                conversations=[{'from': 'human', 'value': f'<image>\n{QUESTION}'},
                               {'from': 'gpt', 'value': caption([d.label for d in digits])}]))
        (root / f'{split}.json').write_text(json.dumps(items))


def read(root, split):
    """The images (N, H, W, 3) in uint8, and the items."""
    items = json.loads((root / f'{split}.json').read_text())
    return np.stack([np.asarray(Image.open(root / item['image'])) for item in items]), items


def verify(root, settings, check):
    """Read everything back; no digit is in both splits, and all captions name what is there."""
    counts, seen = {}, {}
    for split, count in zip(('train', 'val'), settings['captions'], strict=True):
        images, items = read(root, split)
        check(images.shape == (count, *(settings['caption_size'],) * 2, 3), f'{split}: images')
        for item in items:
            labels = [label for label, *_ in item['digits']]
            check(labels == [scenes.load_digits()[1][i] for i in item['sources']] and labels,
                  f'{item["image"]}: digits')
            check(item['conversations'][1]['value'] == caption(labels), f'{item["image"]}: caption')
        seen[split] = {source for item in items for source in item['sources']}
        counts[split] = len(items)
    check(not seen['train'] & seen['val'], 'a digit is both in train and val')
    return counts
