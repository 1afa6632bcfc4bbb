"""Cobra: what the towers give, where images stand, the loss, chats, and the authors' files."""

import pytest
import torch
import torch.nn.functional as F
from mmengine.structures import BaseDataElement
from torch import nn

from vmamba_mm.checkpoints.names import to_official
from vmamba_mm.errors import UserError
from vmamba_mm.heads import ByteTokenizer, Cobra, FileTokenizer, VisionTower
from vmamba_mm.heads.tokenizers import encode_turns, prompt_of
from vmamba_mm.layers import Projector
from vmamba_mm.registry import MODELS

VIT = dict(name='vit_tiny_patch16_224', image_size=20, patch_size=8, embed_dim=8, depth=3,
           num_heads=2)
TOWERS = [dict(VIT, mean=(0.4, 0.5, 0.6), std=(0.2, 0.2, 0.3), reg_tokens=2),
          dict(VIT, embed_dim=12, mean=(0.5,) * 3, std=(0.5,) * 3, class_token=False,
               global_pool='avg')]
LANGUAGE = dict(mixer='mamba', vocab_size=257, embed_dims=16, depth=2, d_state=4)


def make(**more):
    """Random weights large enough that answers differ."""
    torch.manual_seed(0)
    model = MODELS.build(dict(type='vmamba_mm.Cobra', towers=TOWERS, language_model=LANGUAGE,
                              **more)).eval()
    with torch.no_grad():
        for parameter in (*model.language_model.parameters(), *model.projector.parameters()):
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def image_of(seed=0):
    return torch.rand(3, 20, 20, generator=torch.Generator().manual_seed(seed))


def sample_of(*turns):
    return BaseDataElement(metainfo=dict(turns=list(turns)))


# -- towers --------------------------------------------------------------------------------------

@pytest.mark.parametrize('config, prefix', list(zip(TOWERS, (3, 0), strict=True)))
def test_towers_give_tokens_before_the_last_block(config, prefix):
    tower, seen = VisionTower(**config), {}
    images = torch.stack([image_of(0), image_of(1)])
    tower.vit.blocks[1].register_forward_hook(lambda *call: seen.update(tokens=call[-1]))
    mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ('mean', 'std'))
    tower.vit((images - mean) / std)
    expected = seen['tokens'][:, prefix:]  # the 20 pixels have 2 patches of 8, and 4 that are lost
    assert expected.shape == (2, 4, config['embed_dim'])
    torch.testing.assert_close(tower(images), expected)
    assert not tower.train().training and not any(p.requires_grad for p in tower.parameters())


def test_published_towers_by_shape():
    with torch.device('meta'):
        towers = [VisionTower(name, 384) for name in (
            'vit_large_patch14_reg4_dinov2.lvd142m', 'vit_so400m_patch14_siglip_384')]
    assert [tower.embed_dims for tower in towers] == [1024, 1152]
    assert [tower(torch.zeros(1, 3, 384, 384, device='meta')).shape[1] for tower in towers] == [
        729, 729]
    projector = Projector(2176, 2560)
    assert sum(p.numel() for p in projector.parameters()) == 47_789_568
    assert sum(p.numel() for p in Projector(2176, 2560, 'fused-ldp').parameters()) == 41_259_008


def test_weights_of_towers(tmp_path):
    tower = VisionTower(**TOWERS[0])
    torch.save(tower.vit.state_dict(), tmp_path / 'tower.pth')
    init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'tower.pth'))
    other = VisionTower(**TOWERS[0], init_cfg=init_cfg)
    other.init_weights()
    assert torch.equal(other(image_of()[None]), tower(image_of()[None]))
    with pytest.raises(UserError, match='tower.pth does not fit the tower'):
        VisionTower(**dict(TOWERS[0], depth=2), init_cfg=init_cfg).init_weights()
    with pytest.raises(UserError, match="timm has no model 'vit_none'"):
        VisionTower('vit_none')


# -- images before text --------------------------------------------------------------------------

@pytest.mark.parametrize('kind, count', [
    ('linear', 4), ('mlp', 4), ('fused-gelu-mlp', 4), ('ldp', 1), ('fused-ldp', 1)])
def test_sequence_and_loss(kind, count):
    """Of a batch of texts of several lengths, one of them without an image."""
    model = make(projector=kind, projector_side=1)
    images = [image_of(0), None, image_of(1)]
    samples = [sample_of(('What?', 'A three.')), sample_of(('Hi', 'Hello to you.')),
               sample_of(('One?', 'Yes'), ('Two?', 'No'))]
    losses, sizes = [], []
    for image, sample in zip(images, samples, strict=True):
        tokens, labels = encode_turns(model.tokenizer, sample.turns)
        row = model.language_model.token_embed(torch.tensor(tokens))
        if image is not None:
            vectors = model.embed_images(image[None])[0]
            assert len(vectors) == count
            row, labels = torch.cat([vectors, row]), [-100] * count + labels
        logits = model.language_model(None, embeds=row[None])[0, :-1]
        labels = torch.tensor(labels[1:])
        losses.append(F.cross_entropy(logits, labels, reduction='sum'))
        sizes.append(int((labels != -100).sum()))
    assert sizes == [9, 14, 4 + 3]  # the answers, and the end of each
    found = model(images, samples, mode='loss')
    torch.testing.assert_close(found['loss'], sum(losses) / sum(sizes))
    found['loss'].backward()
    assert all(p.grad is not None for p in model.projector.parameters())
    model.zero_grad()
    model.train()(images[1:2], samples[1:2], mode='loss')['loss'].backward()
    assert all(p.grad is not None for p in model.projector.parameters())  # of text alone it is 0


def test_stages():
    for stage, trained in (('align', {'projector'}), ('finetune', {'projector', 'language_model'})):
        model = make(stage=stage)
        assert {name.partition('.')[0] for name, p in model.named_parameters()
                if p.requires_grad} == trained
    with pytest.raises(ValueError, match="stage='all' does not exist"):
        make(stage='all')


# -- chats -----------------------------------------------------------------------------------------

def test_chat_reads_each_token_once():
    """Answers from the state are those of the whole text read anew."""
    model, image, pieces = make(), image_of(), []
    chat, seen, options = model.chat(image), [], dict(max_new_tokens=6)
    vectors = model.embed_images(image[None])
    for number, question in enumerate(('What is there?', 'And here?')):
        seen += model.tokenizer.encode(prompt_of(question, number == 0))
        expected = []
        for _ in range(6):
            read = model.language_model.token_embed(torch.tensor([seen]))
            embeds = torch.cat([vectors, read], 1)
            token = int(model.language_model(None, embeds=embeds)[0, -1, :257].argmax())
            seen.append(token)
            expected.append(token)
            if token == model.tokenizer.end:
                break
        else:
            seen.append(model.tokenizer.end)
        pieces.clear()
        answer = chat.ask(question, stream=pieces.append, **options)
        assert answer == ''.join(pieces) == model.tokenizer.decode(expected)


def test_chat_ends_and_goes_on():
    model = make()
    with torch.no_grad():  # the end is always the likeliest
        model.language_model.lm_head.weight.zero_()
        model.language_model.norm.weight.zero_()
    samples = model([image_of(), None], [sample_of(('a', 'b')), sample_of(('a', 'b'), ('c', 'd'))],
                    mode='predict')
    assert all(len(sample.pred_text) <= 256 for sample in samples)


def test_sampling_is_the_generators():
    model = make(generation=dict(max_new_tokens=5, temperature=1.0))
    answers = {model.chat(image_of()).ask(
        'What?', generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2, 3)}
    assert 2 <= len(answers) <= 3


# -- tokens ----------------------------------------------------------------------------------------

def test_byte_tokenizer():
    tokenizer = ByteTokenizer()
    assert tokenizer.encode('é<|endoftext|>a') == [195, 169, 256, 97]
    assert tokenizer.decode([195, 169, 256, 97]) == 'éa'
    tokens, labels = encode_turns(tokenizer, [('a', 'b'), ('c', 'd')])
    text = ''.join('<|endoftext|>' if t == 256 else chr(t) for t in tokens)
    assert text == ('<|user|>\na<|endoftext|>\n<|assistant|>\nb<|endoftext|>'
                    '\n<|user|>\nc<|endoftext|>\n<|assistant|>\nd<|endoftext|>')
    assert [t for t in labels if t != -100] == [98, 256, 100, 256]
    assert all(label in (-100, token) for label, token in zip(labels, tokens, strict=True))


def test_tokenizers_of_files(tmp_path):
    tokenizers = pytest.importorskip('tokenizers')
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token=None))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=['<|endoftext|>'],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    inner.train_from_iterator(['a three and a seven'] * 5, trainer)
    inner.save(str(tmp_path / 'tokenizer.json'))
    tokenizer = FileTokenizer(str(tmp_path))
    tokens = tokenizer.encode('a three<|endoftext|>')
    assert tokens[-1] == tokenizer.end == 0 and tokenizer.decode(tokens) == 'a three'
    model = make(tokenizer=str(tmp_path))
    with pytest.raises(UserError, match='the tokenizer has .* tokens, and the language model 257'):
        model.chat().ask('What?')
    with pytest.raises(UserError, match='none.json does not exist: give the tokenizer.json'):
        FileTokenizer(str(tmp_path / 'none.json'))


# -- the authors' files --------------------------------------------------------------------------

def official(model):
    language = {f'llm.{k}': v.clone() for k, v in
                to_official(model.language_model.state_dict()).items()}
    return dict(model=dict(projector=model.projector.state_dict(), llm_backbone=language))


def test_official_files(tmp_path):
    model = make()
    torch.save(official(model), tmp_path / 'cobra.pt')
    other = make(init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'cobra.pt')))
    nn.init.zeros_(other.projector.projector[0].weight)
    nn.init.zeros_(other.language_model.norm.weight)
    other.init_weights()
    for name in ('projector', 'language_model'):
        ours, theirs = (part.get_submodule(name).state_dict() for part in (other, model))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert Cobra.is_official(tmp_path / 'cobra.pt')


@pytest.mark.parametrize('change, message', [
    (lambda c: c['model']['projector'].pop('projector.0.bias'), 'projector in .*projector.0.bias'),
    (lambda c: c['model']['llm_backbone'].pop('llm.backbone.layers.1.mixer.D'),
     'language model in .*blocks.1.mixer.D'),
    (lambda c: c['model'].pop('projector'), 'holds nothing under model.projector')])
def test_official_files_that_do_not_fit(tmp_path, change, message):
    content = official(make())
    content['model']['projector'] = dict(content['model']['projector'])
    change(content)
    torch.save(content, tmp_path / 'cobra.pt')
    with pytest.raises(UserError, match=message):
        make().load_official(tmp_path / 'cobra.pt')
