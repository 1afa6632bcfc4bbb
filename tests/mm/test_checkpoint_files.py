import os

import pytest
import torch

from vmamba_mm.checkpoints.files import read_checkpoint
from vmamba_mm.errors import UserError
from vmamba_mm.mm.hooks import checkpoint as ck


def save(path, **content):
    torch.save(dict(state_dict={'w': torch.arange(2000.)}, **content), path)


def test_write_atomic_keeps_the_old_file_when_writing_fails(tmp_path, monkeypatch):
    path = tmp_path / 'epoch_1.pth'
    ck.write_atomic(b'old', path)

    def fail(fd):
        raise OSError('disk full')

    monkeypatch.setattr(os, 'fsync', fail)
    with pytest.raises(OSError):
        ck.write_atomic(b'new', path)
    assert path.read_bytes() == b'old'
    assert os.listdir(tmp_path) == ['epoch_1.pth']


def test_half_written_checkpoint_is_never_resumed_from(tmp_path):
    save(tmp_path / 'epoch_1.pth')
    save(tmp_path / 'epoch_2.pth')
    whole = (tmp_path / 'epoch_2.pth').read_bytes()
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'epoch_2.pth'))
    assert ck.find_resumable(tmp_path).endswith('epoch_2.pth')
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 255
    for content in (whole[:-100], whole[:100], b'', bytes(damaged)):
        (tmp_path / 'epoch_2.pth').write_bytes(content)
        told = []
        assert ck.find_resumable(tmp_path, told.append).endswith('epoch_1.pth')
        assert len(told) == 1 and 'epoch_2.pth' in told[0]


@pytest.mark.parametrize('pointer', ['', 'gone/epoch_10.pth', None])
def test_last_checkpoint_may_be_wrong(tmp_path, pointer):
    if pointer is not None:
        (tmp_path / 'last_checkpoint').write_text(pointer)
    assert ck.find_resumable(tmp_path) is None
    for epoch in (9, 10):
        save(tmp_path / f'epoch_{epoch}.pth')
    (tmp_path / f'.epoch_11.pth.1{ck.TEMP_SUFFIX}').write_bytes(b'half')
    assert ck.find_resumable(tmp_path).endswith('epoch_10.pth')


def test_read_checkpoint_is_safe(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, ('true',)

    torch.save({'state_dict': Evil()}, tmp_path / 'evil.pth')
    with pytest.raises(UserError, match='system'):
        read_checkpoint(tmp_path / 'evil.pth')
    torch.save([1], tmp_path / 'list.pth')
    with pytest.raises(UserError, match='list'):
        read_checkpoint(tmp_path / 'list.pth')


def make_runner(tmp_path, **checkpoint):
    """A real Runner around one weight."""
    from mmengine.model import BaseModel
    from mmengine.runner import Runner
    from torch.utils.data import DataLoader, TensorDataset

    class Model(BaseModel):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.zeros(1))

        def forward(self, inputs, mode='tensor'):
            return {'loss': (self.w - inputs).pow(2).mean()}

    data = DataLoader(TensorDataset(torch.randn(4, 1)), batch_size=1, collate_fn=lambda b: {
        'inputs': torch.stack([x[0] for x in b])})
    return Runner(
        Model(), str(tmp_path), train_dataloader=data, train_cfg=dict(by_epoch=True, max_epochs=4),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1)), log_level='ERROR',
        default_hooks=dict(checkpoint=dict(type='vmamba_mm.AtomicCheckpointHook', interval=1,
                                           **checkpoint)),
        experiment_name=f'{tmp_path.name}{torch.randint(2**40, ())}')


def test_old_checkpoint_goes_after_the_new_one_is_complete(tmp_path, monkeypatch):
    present = []
    real = os.replace

    def replace(src, dst):
        real(src, dst)
        present.append((os.path.basename(dst), sorted(p.name for p in tmp_path.glob('*.pth'))))

    monkeypatch.setattr(ck.os, 'replace', replace)
    (tmp_path / f'.epoch_9.pth.1{ck.TEMP_SUFFIX}').write_bytes(b'half')
    make_runner(tmp_path, max_keep_ckpts=1).train()
    assert present == [
        (name, files) for i in range(1, 5)
        for files in [[f'epoch_{j}.pth' for j in range(max(i - 1, 1), i + 1)]]
        for name in (f'epoch_{i}.pth', 'last_checkpoint')]
    assert [p.name for p in tmp_path.glob('*.pth')] == ['epoch_4.pth']
    assert not list(tmp_path.glob(f'*{ck.TEMP_SUFFIX}'))


def test_dies_while_saving(mm, tmp_path, monkeypatch):
    """The process ends in the midst of writing the third checkpoint."""
    real = os.fsync
    calls = []

    def fsync(fd):
        calls.append(fd)
        if len(calls) == 9:  # four for each of the first two saves
            raise KeyboardInterrupt
        real(fd)

    monkeypatch.setattr(ck.os, 'fsync', fsync)
    with pytest.raises(KeyboardInterrupt):
        make_runner(tmp_path, max_keep_ckpts=1).train()
    assert ck.find_resumable(tmp_path).endswith('epoch_2.pth')
    content = read_checkpoint(tmp_path / 'epoch_2.pth')
    assert content['meta']['epoch'] == 2
