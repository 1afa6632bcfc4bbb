"""CausalLM against transformers' Mamba and Mamba-2 in plain PyTorch: tokens/s of a prompt and of a
text.

Both have the same random weights. Checks logits and texts against theirs first, in fp32; a wrong
result ends the run before any timing. Models take turns; the median round counts. Needs the package
transformers; the kernels that it can use must not be installed, or they run in place of its plain
path.

Example: python tools/bench/language_model.py --arch mamba-130m --prompt 512 --new 32 --threads 2
"""

import argparse
import importlib.util
import platform
import statistics
import sys
import time

import torch

import vmamba_mm
from vmamba_mm.checkpoints.names import to_official
from vmamba_mm.mm.measuring import cpu_name
from vmamba_mm.models import CausalLM


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--arch', default='mamba-130m', choices=[
        name for name, arch in CausalLM.arch_settings.items()
        if arch['mixer'] in ('mamba', 'mamba2') and 'attn_layers' not in arch])
    parser.add_argument('--depth', type=int, help="blocks (default: the arch's)")
    parser.add_argument('--batch', type=int, default=1)
    parser.add_argument('--prompt', type=int, default=512, help='tokens of the prompt')
    parser.add_argument('--new', type=int, default=32, help='tokens that are added')
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--rounds', type=int, default=3)
    return parser.parse_args()


def build(arch: str, depth: int | None) -> tuple[CausalLM, torch.nn.Module]:
    """Ours and theirs, with the same weights."""
    from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM

    ours = CausalLM(arch, **({} if depth is None else dict(depth=depth))).eval()
    options = dict(vocab_size=ours.token_embed.num_embeddings, hidden_size=ours.arch['embed_dims'],
                   num_hidden_layers=ours.arch['depth'], eos_token_id=None,
                   tie_word_embeddings=True)
    if ours.arch['mixer'] == 'mamba2':
        mixer = ours.blocks[0].mixer
        theirs = Mamba2ForCausalLM(Mamba2Config(
            **options, num_heads=mixer.num_heads, head_dim=mixer.head_dim, n_groups=mixer.n_groups,
            state_size=mixer.d_state)).eval()
    else:
        theirs = MambaForCausalLM(MambaConfig(**options)).eval()
    theirs.load_state_dict({name.replace('.embedding.', '.embeddings.'): value for name, value in
                            to_official(ours.state_dict(), ours.family).items()})
    return ours, theirs


def generate(model: torch.nn.Module, prompts: torch.Tensor, count: int) -> torch.Tensor:
    if isinstance(model, CausalLM):
        return model.generate(prompts, count)
    return model.generate(prompts, max_new_tokens=count, min_new_tokens=count, do_sample=False,
                          pad_token_id=0, attention_mask=torch.ones_like(prompts))


def verify(ours: CausalLM, theirs: torch.nn.Module, prompts: torch.Tensor) -> None:
    expected, found = theirs(prompts).logits, ours(prompts)
    error = ((found - expected).norm() / expected.norm()).item()
    same = torch.equal(generate(ours, prompts, 8), generate(theirs, prompts, 8))
    print(f'logits against those of transformers: relative error {error:.1e} (allowed 1e-5); '
          f'texts are {"the same" if same else "NOT the same"}', flush=True)
    if not (error <= 1e-5 and same):
        sys.exit('The model is wrong; nothing was timed.')


def seconds_in_turns(calls: dict, rounds: int) -> dict[str, float]:
    """Median seconds of each call; the first round warms up."""
    seconds = {name: [] for name in calls}
    for i in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if i > 0:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(s) for name, s in seconds.items()}


@torch.no_grad()
def main() -> None:
    args = parse_args()
    if importlib.util.find_spec('transformers') is None:
        sys.exit('error: this comparison needs the package transformers: pip install transformers')
    import transformers
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print(f'{platform.processor() or platform.machine()} ({cpu_name()}), {args.threads} threads, '
          f'fp32, {args.arch}{f" of {args.depth} blocks" if args.depth else ""}, batch '
          f'{args.batch}; torch {torch.__version__}, transformers {transformers.__version__}, '
          f'vmamba_mm {vmamba_mm.__version__}')
    ours, theirs = build(args.arch, args.depth)
    prompts = torch.randint(ours.vocab_size, (args.batch, args.prompt))
    verify(ours, theirs, prompts[:, :64])

    models = {'ours': ours, 'transformers': theirs}
    reading = seconds_in_turns({name: lambda m=model: m(prompts, logits_to_keep=1)
                                for name, model in models.items()}, args.rounds)
    writing = seconds_in_turns({name: lambda m=model: generate(m, prompts[:, :1], args.new)
                                for name, model in models.items()}, args.rounds)
    for what, seconds, count in ((f'prompt of {args.prompt}', reading, args.prompt),
                                 (f'{args.new} new tokens', writing, args.new)):
        speed = {name: args.batch * count / s for name, s in seconds.items()}
        print(f'{what:16s} ' + '   '.join(f'{name} {v:9.1f} tokens/s' for name, v in speed.items())
              + f'   ratio {speed["ours"] / speed["transformers"]:.2f}', flush=True)


if __name__ == '__main__':
    main()
