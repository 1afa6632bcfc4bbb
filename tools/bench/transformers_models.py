"""transformers' own Mamba, Mamba-2, FalconMamba and Jamba: its slow path against our ops.

    python tools/bench/transformers_models.py                        (on a GPU, 2,048 tokens)
    python tools/bench/transformers_models.py --device cpu --length 256 --models mamba

Both are the same models with the same random weights, before and after
vmamba_mm.dropin.install_transformers(). Compares logits and the gradients of all parameters first,
in fp32 and at a short length; a wrong result ends the run before any timing. Then times a forward
pass without gradients and a training step. The packages mamba_ssm and causal_conv1d must not be
installed, or transformers uses them.
"""

import argparse
import importlib.util
import platform
import sys
import time

import torch

import vmamba_mm
from vmamba_mm.dropin import install_transformers, uninstall_transformers
from vmamba_mm.mm import measuring

DTYPES = dict(fp32=torch.float32, bf16=torch.bfloat16)
MODELS = ('mamba', 'mamba2', 'falcon_mamba', 'jamba')
LIMITS = dict(logits=1e-4, gradients=1e-3)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--models', nargs='+', choices=MODELS, default=list(MODELS))
    parser.add_argument('--device', default='cuda')
    parser.add_argument('--dtype', choices=DTYPES, default='bf16', help='of the timing')
    parser.add_argument('--length', type=int, default=2048)
    parser.add_argument('--batch', type=int, default=1)
    parser.add_argument('--dims', type=int, default=768)
    parser.add_argument('--depth', type=int, default=4, help='layers (default: 4)')
    return parser.parse_args()


def build(name: str, dims: int, depth: int) -> torch.nn.Module:
    """A model of transformers with random weights; of Jamba with attention in the second layer."""
    import transformers

    shared = dict(vocab_size=1024, hidden_size=dims, num_hidden_layers=depth)
    options = {
        'mamba': ('Mamba', {}),
        'falcon_mamba': ('FalconMamba', {}),
        'mamba2': ('Mamba2', dict(num_heads=dims // 32, head_dim=64, n_groups=1)),
        'jamba': ('Jamba', dict(intermediate_size=2 * dims, num_attention_heads=dims // 64,
                                num_key_value_heads=dims // 64, num_experts=4,
                                attn_layer_period=max(depth, 2), attn_layer_offset=1))}
    kind, more = options[name]
    torch.manual_seed(0)
    config = getattr(transformers, f'{kind}Config')(**shared, **more)
    return getattr(transformers, f'{kind}ForCausalLM')(config)


def step(model: torch.nn.Module, tokens: torch.Tensor) -> None:
    model.zero_grad()
    model(tokens, labels=tokens).loss.backward()


def results(model: torch.nn.Module, tokens: torch.Tensor) -> tuple[torch.Tensor, list]:
    """Logits, and all gradients of a training step."""
    with torch.no_grad():
        logits = model.eval()(tokens).logits
    step(model.train(), tokens)
    return logits, [p.grad.clone() for p in model.parameters() if p.grad is not None]


def verify(name: str, model: torch.nn.Module, tokens: torch.Tensor) -> None:
    expected, wanted = results(model, tokens)
    install_transformers()
    logits, gradients = results(model, tokens)
    uninstall_transformers()
    errors = dict(logits=relative(logits, expected), gradients=max(
        relative(ours, theirs) for ours, theirs in zip(gradients, wanted, strict=True)))
    print(f'{name}: ' + ', '.join(f'{what} differ by {error:.1e} (allowed {LIMITS[what]:.0e})'
                                  for what, error in errors.items()), flush=True)
    if not all(errors[what] <= limit for what, limit in LIMITS.items()):
        sys.exit('The results are wrong; nothing was timed.')


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm().clamp_min(1e-6)).item()


def measure(model: torch.nn.Module, tokens: torch.Tensor, on_gpu: bool) -> dict[str, float]:
    """Milliseconds of both calls."""
    model.eval()
    with torch.no_grad():
        forward = measuring.median(lambda: model(tokens), on_gpu, spend=2000)
    model.train()
    return {'forward': forward,
            'training step': measuring.median(lambda: step(model, tokens), on_gpu, spend=2000)}


def main() -> None:
    args = parse_args()
    if importlib.util.find_spec('transformers') is None:
        sys.exit('error: this comparison needs the package transformers: pip install transformers')
    installed = [name for name in ('mamba_ssm', 'causal_conv1d') if importlib.util.find_spec(name)]
    if installed:
        sys.exit(f'error: {" and ".join(installed)} would run in place of the slow path')
    import transformers

    torch.backends.cuda.matmul.allow_tf32 = False
    on_gpu = args.device.startswith('cuda')
    device = torch.cuda.get_device_name() if on_gpu else platform.processor() or 'CPU'
    print(f'{device}; {args.dtype}, {args.batch} x {args.length} tokens, {args.depth} layers of '
          f'{args.dims} channels; torch {torch.__version__}, transformers '
          f'{transformers.__version__}, vmamba_mm {vmamba_mm.__version__}')
    tokens = torch.randint(1024, (args.batch, args.length), device=args.device)
    for name in args.models:
        model = build(name, args.dims, args.depth).to(args.device)
        verify(name, model, tokens[:, :128])
        model = model.to(DTYPES[args.dtype])
        start = time.perf_counter()
        slow = measure(model, tokens, on_gpu)
        install_transformers()
        fast = measure(model, tokens, on_gpu)
        uninstall_transformers()
        for what, ms in slow.items():
            print(f'  {what:14s} slow path {ms:9.2f} ms   ours {fast[what]:9.2f} ms   '
                  f'{ms / fast[what]:.1f} times as fast', flush=True)
        print(f'  measured in {time.perf_counter() - start:.0f} s', flush=True)


if __name__ == '__main__':
    main()
