"""Reading checkpoint files of every format, and refusing what is broken or hostile."""

import errno
import hashlib
import http.server
import json
import os
import sys
import threading

import pytest
import torch
from official import (
    S1,
    classifier_state,
    dense_state,
    random_backbone,
    save_hostile,
    save_training_file,
)

from vmamba_mm import atomic
from vmamba_mm.atomic import write_atomic
from vmamba_mm.checkpoints.files import fetch, read_checkpoint, sha256_of
from vmamba_mm.checkpoints.names import to_mm
from vmamba_mm.errors import UserError


@pytest.fixture(scope='module')
def official():
    return classifier_state(random_backbone(S1, (3,)), 10)


def assert_holds(path, official, **kwargs):
    found = read_checkpoint(path, **kwargs)
    expected = to_mm(official)
    assert set(found['state_dict']) == set(expected)
    assert all(torch.equal(found['state_dict'][k], v) for k, v in expected.items())
    assert found['meta']['arch'] == S1 and found['meta']['task'] == 'cls'
    return found


# --- formats --------------------------------------------------------------------------------

def test_training_file_without_yacs(official, tmp_path):
    path = save_training_file(tmp_path / 'a.pth', official)
    assert 'yacs' not in sys.modules
    found = assert_holds(path, official)
    assert found['meta']['weights'] == 'model' and found['meta']['epoch'] == 264
    assert set(found) == {'meta', 'state_dict'}


def test_choice_of_weights(official, tmp_path):
    averaged = {k: v + 1 for k, v in official.items()}
    path = save_training_file(tmp_path / 'a.pth', official, averaged)
    assert assert_holds(path, averaged)['meta']['weights'] == 'model_ema'
    assert_holds(path, averaged, weights='model_ema')
    assert_holds(path, official, weights='model')
    path = save_training_file(tmp_path / 'b.pth', official)
    with pytest.raises(UserError, match="'model_ema', only under 'model'"):
        read_checkpoint(path, weights='model_ema')
    with pytest.raises(ValueError, match='auto'):
        read_checkpoint(path, weights='ema')
    path = save_training_file(tmp_path / 'c.pth', official, model_ema={})
    assert_holds(path, official)


def test_bare_state_dicts(official, tmp_path):
    for state in (official, to_mm(official), {f'module.{k}': v for k, v in official.items()}):
        torch.save(state, tmp_path / 'a.pth')
        assert_holds(tmp_path / 'a.pth', official)
        assert_holds(f'file://{tmp_path}/a.pth', official)


def test_file_of_torch_before_1_6(official, tmp_path):
    torch.save(dict(model=official), tmp_path / 'a.pth', _use_new_zipfile_serialization=False)
    assert_holds(tmp_path / 'a.pth', official)


def test_safetensors(official, tmp_path):
    from safetensors.torch import save_file

    save_file({k: v.contiguous() for k, v in official.items()}, tmp_path / 'a.safetensors')
    assert_holds(tmp_path / 'a.safetensors', official)
    (tmp_path / 'a.safetensors').rename(tmp_path / 'a.bin')  # told by the content
    assert_holds(tmp_path / 'a.bin', official)


def test_checkpoint_of_mmengine(mm, tmp_path):
    """As published for detection: a history of numpy values, and functions pickled with it."""
    from mmengine.logging import HistoryBuffer, MessageHub

    hub = MessageHub('test_files')
    for i in range(3):
        hub.update_scalar('train/loss', 1.0 / (i + 1))
    state = dense_state(random_backbone(S1)) | {'rpn_head.rpn_cls.bias': torch.zeros(3)}
    torch.save(dict(meta=dict(epoch=12, dataset_meta=dict(classes=('a', 'b'))), state_dict=state,
                    message_hub=hub.state_dict()), tmp_path / 'a.pth')
    found = read_checkpoint(tmp_path / 'a.pth')
    assert set(found['state_dict']) == set(to_mm(state))
    assert found['meta'] == dict(epoch=12, dataset_meta=dict(classes=('a', 'b')), arch=S1,
                                 task='det')
    history = found['message_hub']['log_scalars']['train/loss']
    assert isinstance(history, HistoryBuffer) and history.current() == pytest.approx(1 / 3)


def test_checkpoint_of_mmengine_without_mmengine(tmp_path):
    """timm users have the file and not the package: what pickles the history is not called."""
    import subprocess

    state = dense_state(random_backbone(S1))
    code = (f'import sys\nfrom vmamba_mm.checkpoints.files import read_checkpoint\n'
            f'found = read_checkpoint({str(tmp_path / "a.pth")!r})\n'
            'assert len(found["state_dict"]) > 10 and "mmengine" not in sys.modules')
    from mmengine.logging import MessageHub
    hub = MessageHub('test_files_2')
    hub.update_scalar('train/loss', 1.0)
    torch.save(dict(meta={}, state_dict=state, message_hub=hub.state_dict()), tmp_path / 'a.pth')
    subprocess.run([sys.executable, '-c', code], check=True)


def test_checkpoint_of_another_model_is_returned_as_it_is(tmp_path):
    content = dict(state_dict={'conv1.weight': torch.zeros(3)}, meta=dict(epoch=1))
    torch.save(content, tmp_path / 'a.pth')
    found = read_checkpoint(tmp_path / 'a.pth')
    assert found['meta'] == content['meta'] and list(found['state_dict']) == ['conv1.weight']


# --- hostile and broken files ---------------------------------------------------------------

def test_hostile_pickle_is_refused_and_does_not_run(official, tmp_path):
    witness = tmp_path / 'ran'
    path = save_hostile(tmp_path / 'a.pth', official, witness)
    with pytest.raises(UserError, match='not safe to load.*system'):
        read_checkpoint(path)
    assert not witness.exists()


@pytest.mark.parametrize('call', [
    ('subprocess', 'Popen', ['touch', 'WITNESS']), ('builtins', 'exec', 'open("WITNESS", "w")'),
    ('builtins', 'eval', 'open("WITNESS", "w")'), ('builtins', 'getattr', 'os', 'system'),
    ('runpy', 'run_path', 'WITNESS'), ('pathlib', 'Path.touch', 'WITNESS')])
@pytest.mark.parametrize('legacy', [False, True])
def test_other_hostile_pickles(call, legacy, official, tmp_path):
    """Written opcode by opcode, as an attacker may; each would work with a trusting reader."""
    witness = tmp_path / 'ran'
    module, name, *args = [[b.replace('WITNESS', str(witness)) for b in a] if isinstance(a, list)
                           else a.replace('WITNESS', str(witness)) for a in call]

    class Call:
        def __reduce__(self):
            import importlib
            function = importlib.import_module(module)
            for part in name.split('.'):
                function = getattr(function, part)
            return function, tuple(args)

    if call[1] == 'getattr':
        args[0] = torch.Size  # an allowed type in place of the history's
    torch.save(dict(state_dict=official, x=Call()), tmp_path / 'a.pth',
               _use_new_zipfile_serialization=not legacy)
    with pytest.raises(UserError, match='not safe to load|cannot be read'):
        read_checkpoint(tmp_path / 'a.pth')
    assert not witness.exists()


def test_hostile_file_through_mmengine(mm, official, tmp_path):
    """mmengine's own loader would run it: where it may not load safely, it loads all."""
    from mmengine.runner import load_checkpoint

    import vmamba_mm.mm  # noqa: F401 (registers the reader)

    witness = tmp_path / 'ran'
    path = save_hostile(tmp_path / 'a.pth', official, witness)
    with pytest.raises(UserError, match='not safe'):
        load_checkpoint(torch.nn.Linear(1, 1), str(path))
    assert not witness.exists()


def test_hostile_address_through_mmengine(mm, official, server, tmp_path):
    from mmengine.runner import load_checkpoint

    import vmamba_mm.mm  # noqa: F401 (registers the reader)

    witness = tmp_path / 'ran'
    body = save_hostile(tmp_path / 'a.pth', official, witness).read_bytes()
    server.answers['/a.pth'] = (200, body, len(body))
    with pytest.raises(UserError, match='not safe'):
        load_checkpoint(torch.nn.Linear(1, 1), f'{server.url}/a.pth')
    assert not witness.exists()


@pytest.mark.parametrize('content, message', [
    (b'', 'empty'), (b'   \n', 'empty'),
    (b'<!DOCTYPE html><html>Not Found</html>', 'web page'),
    (b'\n<html><body>rate limit</body></html>', 'web page'),
    (b'version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n', 'Git LFS'),
    (b'hello', 'cannot be read'), (os.urandom(1000), 'cannot be read')])
def test_not_a_checkpoint(content, message, tmp_path):
    (tmp_path / 'a.pth').write_bytes(content)
    with pytest.raises(UserError, match=message) as info:
        read_checkpoint(tmp_path / 'a.pth')
    assert str(tmp_path / 'a.pth') in str(info.value)


@pytest.mark.parametrize('name', ['a.pth', 'a.safetensors'])
@pytest.mark.parametrize('part', [0.05, 0.5, 0.999])
def test_truncated_file(name, part, official, tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / name
    if name == 'a.pth':
        save_training_file(path, official)
    else:
        save_file({k: v.contiguous() for k, v in official.items()}, path)
    path.write_bytes(path.read_bytes()[:int(part * path.stat().st_size)])
    with pytest.raises(UserError, match='cannot be read as a checkpoint'):
        read_checkpoint(path)


def test_no_file(tmp_path):
    with pytest.raises(UserError, match='does not exist'):
        read_checkpoint(tmp_path / 'a.pth')
    with pytest.raises(UserError, match='is a folder'):
        read_checkpoint(tmp_path)
    torch.save([1], tmp_path / 'list.pth')
    with pytest.raises(UserError, match='list'):
        read_checkpoint(tmp_path / 'list.pth')


# --- downloads ------------------------------------------------------------------------------

class Server(http.server.BaseHTTPRequestHandler):
    def do_GET(self):  # noqa: N802 (http.server's name)
        self.server.seen.append(self.path)
        status, body, length = self.server.answers.get(self.path, (404, b'no', 2))
        self.send_response(status)
        self.send_header('Content-Length', str(length))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A web server on this machine; ``answers``: path -> (status, body, announced length)."""
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'home'))
    monkeypatch.setenv('no_proxy', '127.0.0.1')
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Server)
    server.answers, server.seen = {}, []
    server.url = f'http://127.0.0.1:{server.server_port}'
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def body(official, tmp_path):
    return save_training_file(tmp_path / 'source.pth', official).read_bytes()


def cached(tmp_path):
    return sorted(p.name for p in (tmp_path / 'home').rglob('*')
                  if p.is_file() and not p.name.endswith('.lock'))


def test_download_once_and_check_at_reuse(server, official, body, tmp_path, capsys):
    server.answers['/%23v2cls/a.pth'] = (200, body, len(body))
    url = f'{server.url}/#v2cls/a.pth'  # the '#' of the official release tags
    assert_holds(url, official)
    assert_holds(f'{server.url}/%23v2cls/a.pth', official)
    assert server.seen == ['/%23v2cls/a.pth']
    path = fetch(url)
    record = json.loads(path.with_name(f'{path.name}.json').read_text())
    assert record == dict(url=f'{server.url}/%23v2cls/a.pth', size=len(body),
                          sha256=sha256_of(path))
    # Somebody damages the cached file: it is fetched again.
    path.write_bytes(body[:-10] + bytes(10))
    capsys.readouterr()
    assert_holds(url, official)
    assert 'has changed' in capsys.readouterr().out
    assert path.read_bytes() == body and len(server.seen) == 2


def test_same_name_at_two_addresses(server, body):
    for folder in ('a', 'b'):
        server.answers[f'/{folder}/c.pth'] = (200, body, len(body))
    assert fetch(f'{server.url}/a/c.pth') != fetch(f'{server.url}/b/c.pth')


@pytest.mark.parametrize('answer, message', [
    (lambda body: (200, body[:-100], len(body)), 'broke off'),
    (lambda body: (200, b'', 0), 'broke off'),
    (lambda body: (200, b'<html>quota</html>', 18), 'web page'),
    (lambda body: (404, b'no', 2), '404'),
    (lambda body: (503, b'no', 2), '503')])
def test_broken_download_leaves_nothing(answer, message, server, official, body, tmp_path):
    server.answers['/a.pth'] = answer(body)
    with pytest.raises(UserError, match=message) as info:
        read_checkpoint(f'{server.url}/a.pth')
    assert f'{server.url}/a.pth' in str(info.value)
    assert cached(tmp_path) == []
    server.answers['/a.pth'] = (200, body, len(body))
    assert_holds(f'{server.url}/a.pth', official)


def test_published_hash(server, body, official, tmp_path, monkeypatch):
    """Where the zoo knows the SHA-256 of a file, another is refused."""
    server.answers['/a.pth'] = (200, body, len(body))
    url = f'{server.url}/a.pth'
    hashes = {url: '0' * 64}
    monkeypatch.setattr('vmamba_mm.checkpoints.files.published_sha256', hashes.get)
    with pytest.raises(UserError, match=f'{url} gave .*, not the published one, 0{{64}}; nothing'):
        fetch(url)
    assert cached(tmp_path) == []
    hashes[url] = hashlib.sha256(body).hexdigest()
    assert_holds(url, official)


def test_no_network(tmp_path, monkeypatch):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'home'))
    monkeypatch.setenv('no_proxy', '127.0.0.1')
    with pytest.raises(UserError, match='cannot download http://127.0.0.1:9/a.pth.*give the file'):
        fetch('http://127.0.0.1:9/a.pth')
    assert cached(tmp_path) == []


def test_one_of_several_processes_downloads(server, body):
    server.answers['/a.pth'] = (200, body, len(body))
    threads = [threading.Thread(target=fetch, args=(f'{server.url}/a.pth',)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert server.seen == ['/a.pth']


def test_long_downloads_show_their_progress(server, body, monkeypatch, capsys):
    """On a terminal; a log would be full of bars."""
    monkeypatch.setattr(sys.stderr, 'isatty', lambda: True)
    long = bytes(21 << 20)
    for path, content, is_shown in (('/short.pth', body, False), ('/long.pth', long, True)):
        server.answers[path] = (200, content, len(content))
        fetch(f'{server.url}{path}')
        out, err = capsys.readouterr()
        assert out.startswith(f'Downloading {server.url}{path} to ')
        assert ('21.0M/21.0M' in err) == is_shown
    monkeypatch.setattr(sys.stderr, 'isatty', lambda: False)
    server.answers['/other.pth'] = (200, long, len(long))
    fetch(f'{server.url}/other.pth')
    assert not capsys.readouterr().err


# --- a full disk ----------------------------------------------------------------------------

@pytest.fixture
def full_disk(monkeypatch):
    """Whatever is written by atomic_file goes to /dev/full, which has no space."""
    def no_space(path, mode='r', *args, **kwargs):
        if str(path).endswith(atomic.TEMP_SUFFIX):
            path = '/dev/full'
        return open(path, mode, *args, **kwargs)

    monkeypatch.setattr(atomic, 'open', no_space, raising=False)


def test_full_disk_when_downloading(full_disk, server, body, tmp_path):
    server.answers['/a.pth'] = (200, body, len(body))
    with pytest.raises(OSError) as info:
        fetch(f'{server.url}/a.pth')
    assert info.value.errno == errno.ENOSPC and 'a.pth' in info.value.filename
    assert cached(tmp_path) == []


def test_full_disk_when_writing(full_disk, tmp_path):
    (tmp_path / 'a.pth').write_bytes(b'old')
    with pytest.raises(OSError, match='No space left') as info:
        write_atomic(b'new' * 10000, tmp_path / 'a.pth')
    assert info.value.filename == str(tmp_path / 'a.pth')
    assert (tmp_path / 'a.pth').read_bytes() == b'old' and len(os.listdir(tmp_path)) == 1
