"""What test_nnunet.py runs in a Python that has nnU-Net: ``FOLDER STEP``.

nnU-Net's commands are called as their entry points, in a process each, on very little data and with
a short epoch. Prints what the test looks at.
"""

import json
import os
import sys
from pathlib import Path

TOY = 'Dataset501_Balls'


def main(folder, step):
    import torch
    torch.set_num_threads(1)
    torch.set_num_threads = lambda count: None  # nnU-Net asks for all cores, and others use them
    for name in ('raw', 'preprocessed', 'results'):
        os.environ[f'nnUNet_{name}'] = str(folder / name)
    STEPS[step](folder)


def make_data(folder):
    """Three volumes of noise around a ball, as NIfTI."""
    import numpy as np
    import SimpleITK
    data = folder / 'raw' / TOY
    (data / 'imagesTr').mkdir(parents=True)
    (data / 'labelsTr').mkdir()
    rng = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(*map(np.arange, (8, 16, 16)), indexing='ij'), axis=-1)
    for i in range(3):
        centre = rng.uniform((3, 6, 6), (5, 10, 10))
        label = (np.square(grid - centre).sum(-1) < 9).astype(np.uint8)
        image = rng.normal(size=label.shape).astype(np.float32) + 3 * label
        for values, path in ((image, f'imagesTr/ball_{i}_0000'), (label, f'labelsTr/ball_{i}')):
            SimpleITK.WriteImage(SimpleITK.GetImageFromArray(values),
                                 str(data / f'{path}.nii.gz'))
    (data / 'dataset.json').write_text(json.dumps(dict(
        channel_names={'0': 'MRI'}, labels=dict(background=0, ball=1), numTraining=3,
        file_ending='.nii.gz')))


def preprocess(folder):
    make_data(folder)
    from nnunetv2.experiment_planning.plan_and_preprocess_entrypoints import (
        plan_and_preprocess_entry,
    )
    sys.argv[1:] = ['-d', '501', '--verify_dataset_integrity', '-npfp', '1', '-np', '1',
                    '-c', '2d', '3d_fullres']
    plan_and_preprocess_entry()


def shorten():
    """nnU-Net's trainer with one epoch of two steps; ours inherit from it."""
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
    initialize = nnUNetTrainer.initialize

    def short(self):
        self.num_epochs, self.num_iterations_per_epoch = 1, 2
        self.num_val_iterations_per_epoch = 1
        initialize(self)
        print('LR', self.initial_lr, 'SCALER', self.grad_scaler)

    nnUNetTrainer.initialize = short


def train(configuration, trainer):
    from nnunetv2.run.run_training import run_training_entry
    shorten()
    sys.argv[1:] = ['501', configuration, 'all', '-tr', trainer, '-device', 'cpu']
    run_training_entry()


def predict(folder):
    from nnunetv2.inference.predict_from_raw_data import predict_entry_point
    sys.argv[1:] = ['-i', str(folder / 'raw' / TOY / 'imagesTr'), '-o', str(folder / 'predicted'),
                    '-d', '501', '-c', '3d_fullres', '-f', 'all', '-tr', 'nnUNetTrainerUMambaEnc',
                    '--disable_tta', '-device', 'cpu', '-npp', '1', '-nps', '1']
    predict_entry_point()


def build(folder):
    """Each trainer by its name, as nnU-Net finds it: its network, and a step of training."""
    import torch
    from nnunetv2.run.run_training import get_trainer_from_args
    for name in ('UMambaBot', 'UMambaEnc', 'UMambaEncNoAMP'):
        for configuration in ('2d', '3d_fullres'):
            trainer = get_trainer_from_args('501', configuration, 'all', f'nnUNetTrainer{name}',
                                            device=torch.device('cpu'))
            trainer.initialize()
            network, size = trainer.network, trainer.configuration_manager.patch_size
            with torch.autocast('cpu', torch.bfloat16):
                maps = network(torch.randn(1, 1, *size))
            trainer.set_deep_supervision_enabled(False)
            with torch.no_grad():
                whole = network(torch.randn(1, 1, *size))
            print('BUILT', json.dumps(dict(
                trainer=name, size=list(size), variant=network.arch['variant'],
                blocks=network.arch['n_conv_per_stage'], dtype=str(maps[0].dtype),
                maps=[list(y.shape) for y in maps], whole=list(whole.shape),
                scaled=trainer.grad_scaler is not None)))


STEPS = {
    'preprocess': preprocess, 'build': build, 'predict': predict,
    'train_2d': lambda folder: train('2d', 'nnUNetTrainerUMambaBot'),
    'train_3d': lambda folder: train('3d_fullres', 'nnUNetTrainerUMambaEnc'),
}

if __name__ == '__main__':
    main(Path(sys.argv[1]), sys.argv[2])
