"""The trainings of mqar.py: one model with one width, learning rate and seed, which can go on.

Nothing is drawn during a training: batches come in the order of the data, and there is no dropout.
So a training that was interrupted and goes on from its file ends with the same weights.
"""

import contextlib
import gc
import json
import math
import time
from pathlib import Path
from typing import NamedTuple

from mqar_models import build_model
from small_data_recipe import lr_factor

from vmamba_mm.atomic import atomic_file, write_atomic

SAVE_EVERY = 15  # seconds
WARM_UP_STEPS = 3  # before a CUDA graph is captured


class Run(NamedTuple):
    """A training, and its name among the files of a study."""

    model: str
    d_model: int
    lr: float
    seed: int

    @property
    def name(self):
        return f'{self.model}_d{self.d_model}_lr{self.lr:g}_seed{self.seed}'

    def __str__(self):
        return f'{self.model}, d_model {self.d_model}, lr {self.lr:g}, seed {self.seed}'


def count_steps(setting):
    """Steps of a whole training; of a segment, what is left of its last batch is dropped."""
    return setting['epochs'] * len(setting['pairs']) * (
        setting['examples'] // setting['batch_size'])


class Training:
    """A model in training, at some step.

    Args:
        run: which.
        data: (segments of training, segments of test), on the device.
        setting: of the study.
    """

    def __init__(self, run, data, setting):
        import torch

        self.train_segments, self.test_segments = data
        self.run, self.setting, self.step, self.rows, self.seconds = run, setting, 0, [], 0.0
        self.steps, self.diverged = count_steps(setting), False
        device = self.device = self.train_segments[0].inputs.device
        torch.manual_seed(run.seed)  # built on the CPU: the same weights on every device
        self.model = build_model(run.model, run.d_model, setting).to(device).train()
        # Only queries have labels, and logits of all tokens would cost more than the mixers.
        self.positions = None
        self.model.lm_head.register_forward_pre_hook(self._pick_queries)
        on_gpu = device.type == 'cuda'
        self.lr = torch.zeros((), device=device) if on_gpu else 0.0
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=self.lr, weight_decay=setting['weight_decay'], fused=True,
            capturable=on_gpu)
        self.autocast = torch.autocast(device.type, torch.bfloat16,
                                       enabled=setting['dtype'] == 'bf16', cache_enabled=False)
        self.graphs = {} if setting['cuda_graphs'] else None

    def _pick_queries(self, head, inputs):
        hidden, = inputs
        return hidden.gather(1, self.positions[..., None].expand(-1, -1, hidden.shape[-1])),

    def logits(self, inputs, positions):
        """(B, K, V) of inputs (B, L) at the positions (B, K)."""
        self.positions = positions
        with self.autocast:
            return self.model(inputs).float()

    # --- steps ------------------------------------------------------------------------------

    def batches(self):
        """The batches that are left: (inputs, positions, values), from few pairs to many."""
        size = self.setting['batch_size']
        count = self.setting['examples'] // size  # of a segment
        for step in range(self.step, self.steps):
            segment = self.train_segments[step // count % len(self.train_segments)]
            first = step % count * size
            here = slice(first, first + size)
            yield segment.inputs[here], segment.positions[here], segment.values[here]

    def _set_lr(self):
        lr = self.run.lr * lr_factor(self.step, self.steps)
        if hasattr(self.lr, 'fill_'):
            self.lr.fill_(lr)
        else:
            for group in self.optimizer.param_groups:
                group['lr'] = lr

    def _update(self, inputs, positions, values):
        """Forward, backward and the optimiser's step; the loss."""
        import torch.nn.functional as F

        logits = self.logits(inputs, positions)
        loss = F.cross_entropy(logits.flatten(0, 1), values.flatten())
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def _capture(self, batch):
        """A CUDA graph of _update for batches of these shapes; weights stay as they are."""
        import torch

        batch = [t.clone() for t in batch]
        gc.collect()  # graphs of an earlier training, freed during a capture, would end it
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            before = None
            if self.optimizer.state:
                before = [t.clone() for t in self._tensors()]
            else:
                weights = [p.detach().clone() for p in self.model.parameters()]
            for _ in range(WARM_UP_STEPS):
                self._update(*batch)
            if before is None:  # the optimiser's state is zero at the start
                before = weights + [torch.zeros_like(t) for t in self._tensors()[len(weights):]]
            with torch.no_grad():
                for tensor, old in zip(self._tensors(), before, strict=True):
                    tensor.copy_(old)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = self._update(*batch)
        return graph, batch, loss

    def _tensors(self):
        """Weights, then the optimiser's state: all that an update changes."""
        weights = list(self.model.parameters())
        return [p.detach() for p in weights] + [
            t for p in weights for t in self.optimizer.state[p].values()]

    def update(self, batch):
        """One step; the loss, on the device: nothing waits for it."""
        self._set_lr()
        if self.graphs is None:
            loss = self._update(*batch)
        else:
            key = batch[1].shape
            if key not in self.graphs:
                self.graphs[key] = self._capture(batch)
            graph, static, loss = self.graphs[key]
            for tensor, new in zip(static, batch, strict=True):
                tensor.copy_(new)
            graph.replay()
            loss = loss.clone()
        self.step += 1
        return loss

    # --- results ----------------------------------------------------------------------------

    def evaluate(self):
        """{pairs: accuracy}: the mean over the test examples of the share of right answers."""
        import torch

        self.model.eval()
        accuracies = {}
        with torch.no_grad():
            for segment in self.test_segments:
                right = 0
                for inputs, positions, values in zip(*(
                        t.split(self.setting['batch_size']) for t in segment[:3]), strict=True):
                    right = right + (self.logits(inputs, positions).argmax(-1) == values).sum()
                accuracies[segment.pairs] = right.item() / segment.values.numel()
        self.model.train()
        return accuracies

    @property
    def accuracy(self):
        """Of the hardest test, with the most pairs; None before the first evaluation."""
        return self.rows[-1]['accuracy'] if self.rows else None

    @property
    def is_done(self):
        return (self.step >= self.steps or self.diverged
                or (self.accuracy or 0) > self.setting['stop_at'])

    def advance(self):
        """Yield after each evaluation, until all is done."""
        import torch

        interval = max(1, self.steps // self.setting['evaluations'])
        losses, start = [], time.perf_counter()
        for batch in self.batches():
            losses.append(self.update(batch))
            if self.step % interval and self.step < self.steps:
                continue
            loss = torch.stack(losses).mean().item()
            self.diverged = not math.isfinite(loss)
            accuracies = self.evaluate()
            self.seconds += time.perf_counter() - start
            self.rows += [dict(self.run._asdict(), step=self.step, pairs=pairs, accuracy=accuracy,
                               loss=None if self.diverged else loss,
                               seconds=round(self.seconds, 3))
                          for pairs, accuracy in accuracies.items()]
            losses = []
            yield
            if self.is_done:
                return
            start = time.perf_counter()

    # --- files ------------------------------------------------------------------------------

    def save(self, path):
        """All that is needed to go on, whole or not at all."""
        import torch

        content = dict(setting=self.setting, run=self.run._asdict(), step=self.step,
                       rows=self.rows, seconds=self.seconds, model=self.model.state_dict(),
                       optimizer=self.optimizer.state_dict()['state'])
        with atomic_file(path) as file:
            torch.save(content, file)

    def load(self, path):
        import torch

        content = torch.load(path, map_location=self.device, weights_only=True)
        check_setting(content['setting'], self.setting, path)
        self.model.load_state_dict(content['model'])
        self.optimizer.load_state_dict(
            dict(self.optimizer.state_dict(), state=content['optimizer']))
        for group in self.optimizer.param_groups:
            group['lr'] = self.lr  # loading makes a copy
        self.step, self.rows, self.seconds = (content[k] for k in ('step', 'rows', 'seconds'))


def check_setting(found, wanted, path):
    """Raise one line unless the results in a file are of the wanted setting."""
    from vmamba_mm.errors import UserError

    for key, value in wanted.items():
        if found.get(key) != value:
            raise UserError(f'{path} is of another setting: {key} was {found.get(key)} there and '
                            f'is {value} here; choose another --out, or the same options')


def read_result(path):
    """What a finished run left: dict(run, setting, environment, steps, accuracy, rows ...)."""
    return json.loads(Path(path).read_text())


def train(run, data, setting, folder, facts, report, is_over):
    """Train a run, or go on with it, until it is done or the time is over.

    Args:
        folder: of the files; RUN.pt is there until RUN.json is.
        facts: what else the result shall hold.
        report: called with the training after each evaluation.
        is_over: () -> bool, whether the time is over.

    Returns:
        Whether the run is done.
    """
    state, result = folder / f'{run.name}.pt', folder / f'{run.name}.json'
    training = Training(run, data, setting)
    if state.exists():
        training.load(state)
    saved = time.perf_counter()
    with contextlib.closing(training.advance()) as evaluations:
        for _ in evaluations:
            report(training)
            if training.is_done:
                break
            over = is_over()
            if over or time.perf_counter() - saved > SAVE_EVERY:
                training.save(state)
                saved = time.perf_counter()
            if over:
                return False
    parameters = sum(p.numel() for p in training.model.parameters())
    write_atomic((json.dumps(dict(
        run=run._asdict(), setting=setting, **facts, parameters=parameters, steps=training.step,
        steps_planned=training.steps, diverged=training.diverged, accuracy=training.accuracy,
        seconds=training.seconds, rows=training.rows), indent=1) + '\n').encode(), result)
    state.unlink(missing_ok=True)
    return True
