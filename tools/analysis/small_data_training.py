"""The trainings of small_data.py: one model with one seed, all of them, and how many epochs."""

import gc
import math
import time

from small_data_models import build
from small_data_recipe import RECIPE, augment, lr_factor, normalise

from vmamba_mm.errors import UserError

MARGIN = 0.9  # of what is left of --minutes: speed varies


class Training:
    """One model with one seed. Batches depend on the seed alone, whatever the model draws.

    Args:
        name: of MODELS.
        mlp_ratio: as of :func:`describe_models`.
        steps: of the whole training, for the schedule.
    """

    def __init__(self, name, mlp_ratio, seed, splits, num_classes, steps, args):
        import torch
        from timm.optim import param_groups_weight_decay

        self.splits, self.steps, self.args, self.step = splits, steps, args, 0
        device = splits['train'].images.device
        torch.manual_seed(seed)  # built on the CPU: the same weights on every device
        self.model = build(name, num_classes, args, mlp_ratio).to(device).train()
        self.generator = torch.Generator(device).manual_seed(seed)
        groups = param_groups_weight_decay(
            self.model, RECIPE['weight_decay'], no_weight_decay_list=self.model.no_weight_decay())
        self.optimizer = torch.optim.AdamW(groups, lr=args.lr, fused=True)
        half = args.dtype == 'fp16'
        self.scaler = torch.amp.GradScaler(device.type, enabled=half)
        # The weights change at every step, so a cache of cast ones gains nothing; graphs forbid it.
        self.autocast = torch.autocast(device.type, torch.float16, enabled=half,
                                       cache_enabled=False)
        if args.cuda_graphs:
            gc.collect()  # graphs of an earlier training, freed during a capture, would end it
            sample = torch.zeros(args.batch_size, 3, args.size, args.size, device=device)
            with self.autocast:
                self.model = torch.cuda.make_graphed_callables(self.model, (sample,))

    def batches(self):
        """Images (B, 3, size, size) and labels (B,) of an epoch; the rest of a batch is dropped."""
        import torch

        train, size = self.splits['train'], self.args.batch_size
        order = torch.randperm(len(train), generator=self.generator,
                               device=self.generator.device)
        for chosen in order[:len(train) // size * size].split(size):
            yield (augment(train.images[chosen], self.args.size, self.generator),
                   train.labels[chosen])

    def train_epoch(self):
        """The mean loss, on the device: nothing waits for it."""
        import torch
        import torch.nn.functional as F

        losses = []
        for images, labels in self.batches():
            for group in self.optimizer.param_groups:
                group['lr'] = self.args.lr * lr_factor(self.step, self.steps)
            with self.autocast:
                logits = self.model(images)
            loss = F.cross_entropy(logits.float(), labels,
                                   label_smoothing=RECIPE['label_smoothing'])
            self.optimizer.zero_grad()
            self.scaler.scale(loss).backward()
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), RECIPE['max_norm'])
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.step += 1
            losses.append(loss.detach())
        return torch.stack(losses).mean()

    def evaluate(self):
        """Top-1 in % on the centres of val."""
        import torch

        val, size = self.splits['val'], self.args.size
        edge = (val.images.shape[-1] - size) // 2
        self.model.eval()
        correct = 0
        with torch.inference_mode(), self.autocast:
            for images, labels in zip(val.images.split(2 * self.args.batch_size),
                                      val.labels.split(2 * self.args.batch_size), strict=True):
                x = normalise(images[:, :, edge:edge + size, edge:edge + size])
                correct = correct + (self.model(x).argmax(1) == labels).sum()
        self.model.train()
        return 100 * correct.item() / len(val)

    def evaluate_without_scan(self):
        """Top-1 in % after B, C and delta's input are set to zero for good; None for models
        without x_proj, VSSD and Swin.

        The states stay at zero then, and a scan returns its skip D x alone (LayerNorms included
        that are part of the pattern). How far it falls tells how much the model uses its scan.
        """
        scans = [p for name, p in self.model.named_parameters() if name.endswith('x_proj_weight')]
        for weight in scans:
            weight.data.zero_()
        return self.evaluate() if scans else None

    def run_epoch(self):
        """Train and evaluate; a row of the results without its names."""
        start = time.perf_counter()
        loss = self.train_epoch().item()  # waits for the device
        seconds = time.perf_counter() - start
        if not math.isfinite(loss):
            raise UserError(f'the loss is {loss} after {self.step} steps: lower --lr, or train '
                            'with --dtype fp32')
        count = len(self.splits['train']) // self.args.batch_size * self.args.batch_size
        return dict(loss=loss, top1=self.evaluate(), top1_no_scan=None,
                    images_per_s=count / seconds)


def find_epochs(models, splits, num_classes, args, start):
    """The most epochs with which all models and seeds fit into --minutes since ``start``."""
    fixed, total = 0, 0
    for name, model in models.items():
        setting = (name, model['mlp_ratio'], 0, splits, num_classes, 1000, args)
        Training(*setting).run_epoch()  # kernels are compiled and memory is allocated
        begin = time.perf_counter()
        training = Training(*setting)
        built = time.perf_counter()
        training.run_epoch()
        total += (time.perf_counter() - built) * len(args.seeds)
        fixed += (built - begin) * len(args.seeds)
    left = MARGIN * (60 * args.minutes - (time.perf_counter() - start) - fixed)
    if left < total:
        raise UserError(f'--minutes {args.minutes:g} is too short: one epoch of all models and '
                        f'seeds takes {total:.1f} s, and {max(left, 0):.1f} s are left after '
                        'reading, timing and building')
    return int(left / total)


def train_all(models, splits, num_classes, epochs, args):
    """The rows of all models, seeds and epochs."""
    from mmengine.utils import ProgressBar

    rows = []
    steps = epochs * (len(splits['train']) // args.batch_size)
    for seed in args.seeds:
        for name, model in models.items():
            print(f'{name}, seed {seed}')
            bar = ProgressBar(epochs)
            training = Training(name, model['mlp_ratio'], seed, splits, num_classes, steps, args)
            for epoch in range(1, epochs + 1):
                rows.append(dict(model=name, seed=seed, epoch=epoch, **training.run_epoch()))
                bar.update()
            rows[-1]['top1_no_scan'] = training.evaluate_without_scan()
            print(f'\n{name}, seed {seed}: loss {rows[-1]["loss"]:.3f}, top-1 '
                  f'{rows[-1]["top1"]:.1f} %', flush=True)
    return sorted(rows, key=lambda row: args.models.index(row['model']))
