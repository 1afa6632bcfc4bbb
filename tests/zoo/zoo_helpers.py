"""What the tests of this folder share besides fixtures."""

import pickle
import re

import torch
from official import dense_state


def metric(out, name):
    return float(re.search(rf'^{name} = (\S+)$', out, re.MULTILINE)[1])


def one_error(err):
    assert 'Traceback' not in err, err[-3000:]
    line, = (line for line in err.splitlines() if line.startswith('error: '))
    return line


def official_input(path):
    """The image as the authors' evaluation gives it to the model (1, 3, 224, 224)."""
    from PIL import Image
    from torchvision import transforms

    steps = transforms.Compose([
        transforms.Resize(256, interpolation=transforms.InterpolationMode.BICUBIC),
        transforms.CenterCrop(224),
        transforms.ToTensor(),
        transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])
    return steps(Image.open(path).convert('RGB'))[None]


@torch.no_grad()
def features(model, root, names):
    """What the official classifier's head gets (B, C)."""
    images = torch.cat([official_input(root / 'images' / n) for n in names])
    return torch.cat([model(batch)[0].mean((2, 3)) for batch in images.split(25)])


def data_options(root, ann_file='val.txt'):
    dataset = 'test_dataloader.dataset'
    return ['--cfg-options', f'{dataset}.data_root={root}', f'{dataset}.ann_file={ann_file}',
            f'{dataset}.data_prefix=images', 'test_dataloader.num_workers=0',
            'test_dataloader.batch_size=25']


def read_scores(path):
    return torch.stack([sample['pred_score'] for sample in pickle.loads(path.read_bytes())])


def assert_scores(found, expected):
    """Equal but for rounding: of other libraries for JPEG, or another number of threads."""
    error = (found.log() - expected.log()).abs().max().item()
    assert error < 1e-3, f'log probabilities differ by {error:.2g}'


def metainfo(task):
    from importlib import import_module

    module, name = {'det': ('mmdet', 'CocoDataset'), 'seg': ('mmseg', 'ADE20KDataset')}[task]
    return getattr(import_module(f'{module}.datasets'), name).METAINFO


def assert_detections(found, expected):
    """Of two runs with another number of threads: nearly equal scores may change places."""
    assert len(found['scores']) == len(expected.scores) > 20
    torch.testing.assert_close(torch.as_tensor(found['scores']), expected.scores, rtol=0,
                               atol=1e-4)
    near = torch.cdist(torch.as_tensor(found['bboxes']), expected.bboxes, p=torch.inf) < 0.5
    same = torch.as_tensor(found['labels'])[:, None] == expected.labels
    assert (near & same).any(1).float().mean() > 0.95


class Dense:
    """A narrow model of a dense config with random weights, and its official file."""

    def __init__(self, task, config, folder):
        from mmengine.config import Config
        from mmengine.logging import MessageHub
        from mmengine.registry import MODELS, init_default_scope

        self.task, self.config = task, config
        self.cfg = Config.fromfile(config)
        init_default_scope(self.cfg.default_scope)
        torch.manual_seed(0)
        self.cfg.model.backbone.init_cfg = None
        self.model = MODELS.build(self.cfg.model).eval()
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.02)
            if task == 'seg':  # never a class that CamVid does not have
                self.model.decode_head.conv_seg.bias[:11] += 100
        others = {k: v for k, v in self.model.state_dict().items()
                  if not k.startswith('backbone.')}
        self.newest = dense_state(self.model.backbone) | others
        official = dense_state(self.model.backbone, 1 if task == 'seg' else 2) | others
        hub = MessageHub(f'tests of the zoo, {task}')
        hub.update_scalar('train/loss', 1.0)
        self.content = dict(meta=dict(epoch=12, dataset_meta=metainfo(task)), state_dict=official,
                            message_hub=hub.state_dict())
        self.file = folder / f'official_{task}.pth'
        torch.save(self.content, self.file)

    def predict(self, image, scale=None):
        """What the model that was written to the file says to an image file."""
        from mmengine.dataset import Compose, pseudo_collate
        from mmengine.registry import init_default_scope

        init_default_scope(self.cfg.default_scope)
        pipeline = [dict(step) for step in self.cfg.test_dataloader.dataset.pipeline
                    if step.type != 'LoadAnnotations']
        if scale:
            pipeline[1]['scale'] = scale
        data = Compose(pipeline)(dict(img_path=str(image), img_id=0))
        with torch.no_grad():
            return self.model.test_step(pseudo_collate([data]))[0]
