"""The vision towers of the demo of captions, which stand in for those that others have trained.

Two small models of timm learn, side by side, which digit is at each patch, from the features that
Cobra reads: those of their second-to-last blocks. One is an XCiT, whose convolutions learn from
little data (a ViT alone had 27 % of the patches after ten epochs), the other a ViT with tokens
beside those of the image, as DINOv2 has.
"""
import time

import captions
import numpy as np

#: Arguments of ``VisionTower``, those of configs/demo/cobra_captions-64.py.
TOWERS = (
    dict(name='xcit_nano_12_p8_224', image_size=64, patch_size=8, embed_dim=64, depth=5,
         num_heads=2, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
    dict(name='vit_tiny_patch16_224', image_size=64, patch_size=8, embed_dim=32, depth=3,
         num_heads=2, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), reg_tokens=4))
NOTHING = 10


def patch_labels(items, size, patch):
    """(N, patches): the class of the digit over the middle of each patch, or ``NOTHING``."""
    middles = np.arange(size // patch) * patch + patch / 2
    labels = np.full((len(items), len(middles), len(middles)), NOTHING)
    for own, item in zip(labels, items, strict=True):
        for label, x, y, width, height in item['digits']:
            rows = (middles >= y) & (middles < y + height)
            columns = (middles >= x) & (middles < x + width)
            own[np.ix_(rows, columns)] = label
    return labels.reshape(len(items), -1)


def train(root, folder, epochs=12, batch=50, rate=2e-3, seed=0):
    """Write the towers' weights into ``folder``.

    Returns:
        The accuracy on held-out patches of digits, in percent, and the seconds that it took.
    """
    import torch
    import torch.nn.functional as F

    from vmamba_mm.heads import VisionTower

    start = time.time()
    torch.manual_seed(seed)
    towers = torch.nn.ModuleList(VisionTower(**tower) for tower in TOWERS)
    towers.requires_grad_(True)
    for tower in towers:
        tower.vit.train()  # a tower itself stays frozen
    head = torch.nn.Linear(sum(tower.embed_dims for tower in towers), NOTHING + 1)
    data = {}
    for split in ('train', 'val'):
        images, items = captions.read(root, split)
        data[split] = (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255,
                       torch.from_numpy(patch_labels(items, images.shape[1], 8)))
    parameters = [*towers.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, rate, weight_decay=0.05)
    images, labels = data['train']
    steps = epochs * (len(images) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.15)

    def logits_of(part):
        return head(torch.cat([tower(part) for tower in towers], -1))

    for epoch in range(epochs):
        total = 0.0
        for rows in torch.randperm(len(images))[:steps // epochs * batch].split(batch):
            loss = F.cross_entropy(logits_of(images[rows]).flatten(0, 1), labels[rows].flatten())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            total += loss.item() * batch / len(images)
        print(f'towers: epoch {epoch + 1} of {epochs}, loss {total:.3f}, '
              f'{time.time() - start:.0f} s', flush=True)
    images, labels = data['val']
    towers.eval()
    with torch.no_grad():
        found = torch.cat([logits_of(part).argmax(-1) for part in images.split(100)])
    is_digit = labels != NOTHING
    folder.mkdir(parents=True, exist_ok=True)
    for i, tower in enumerate(towers):
        torch.save(tower.vit.state_dict(), folder / f'tower{i}.pth')
    accuracy = 100 * (found == labels)[is_digit].float().mean().item()
    return accuracy, time.time() - start
