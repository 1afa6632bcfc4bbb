"""Training on several GPUs: what makes torch's own wrappers cost less for models of many small
parameters."""

from collections.abc import Callable, Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vmamba_mm.layers.stage import Stage
from vmamba_mm.ops.core.grad_places import Places

# --- DistributedDataParallel ----------------------------------------------------------------------

def share_buckets(ddp: DistributedDataParallel) -> None:
    """Let the backward of this package's blocks write gradients into the buckets that the processes
    exchange.

    By itself ``DistributedDataParallel`` copies every gradient there, with a launch for each. The
    exchange is the usual one, the mean of the processes in the gradients' own dtype. As always with
    ``gradient_as_bucket_view``, the next backward writes over gradients that ``grad`` no longer
    holds; and as always with ``DistributedDataParallel``, ``torch.autograd.grad`` is not for it.

    Args:
        ddp: with ``gradient_as_bucket_view=True`` and no communication hook of its own.

    Raises:
        ValueError: without ``gradient_as_bucket_view``.
    """
    if not ddp.gradient_as_bucket_view:
        raise ValueError('share_buckets needs DistributedDataParallel(gradient_as_bucket_view=True)'
                         ', got False')
    group, places, known = ddp.process_group, Places(), {}
    size = dist.get_world_size(group)

    def exchange(_, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        buffer = bucket.buffer()
        if known.get(bucket.index()) != buffer.data_ptr():  # DDP makes them anew after the first
            known[bucket.index()] = buffer.data_ptr()
            places.offer(bucket.parameters(), bucket.gradients())
        # Divided before they are summed, so that gradients in half precision do not overflow.
        work = dist.all_reduce(buffer.div_(size), group=group, async_op=True)
        return work.get_future().then(_first)

    ddp.register_comm_hook(None, exchange)
    ddp.register_forward_pre_hook(lambda module, args: places.renew())


def _first(future: torch.futures.Future[list[Tensor]]) -> Tensor:
    return future.value()[0]


# --- FSDP2 ----------------------------------------------------------------------------------------

#: Parameters of a unit that fully_shard gathers at once: 64 MB of fp32.
UNIT_SIZE = 2**24


def shard(model: nn.Module, mesh=None, *, unit_size: int = UNIT_SIZE, whole_below: int = 0,
          reshard_after_forward: bool = False, **options) -> nn.Module:
    """``torch.distributed.fsdp.fully_shard`` of a model, several blocks to a unit.

    Each unit, and each module that begins or ends one, costs Python a millisecond or two of a step,
    and a block may take less than that on a GPU. So a stage is a unit, or in a backbone without
    stages neighbouring blocks are, and the next unit is gathered while one runs.

    Args:
        model: with stages (:class:`vmamba_mm.layers.stage.Stage`), or with its blocks in lists of
            the name ``blocks``, in the order in which they run, as all backbones have them.
        mesh, options: of ``fully_shard``; a ``mesh`` of one dimension.
        whole_below: parameters of fewer elements stay whole on each process, which must begin with
            the same, and one exchange at the end of a backward averages their gradients. Python
            handles each sharded parameter by itself several times a step, and two thirds of a VSS
            block's are norms, biases and the like. torch's fused optimizers and clipping take no
            mixture of sharded and whole tensors; :func:`on_shards` does.
        unit_size: most parameters of several blocks that are a unit.
        reshard_after_forward: True to give the gathered parameters back after the forward and to
            gather them again in the backward: less memory, twice the gathering. False keeps them
            from the forward to the backward; gradients and optimizer state are sharded either way.

    Returns:
        The model.

    Raises:
        ValueError: if it has no ``blocks``, or no parameter of ``whole_below`` elements.
    """
    from torch.distributed.fsdp import fully_shard

    units = list(_units_of(model, unit_size))
    if not units:
        raise ValueError('shard found no list of modules with the name blocks in '
                         f'{type(model).__name__}: use fully_shard')
    whole = [p for p in model.parameters() if p.numel() < whole_below]
    options['reshard_after_forward'] = reshard_after_forward
    if whole:
        options['ignored_params'] = {*whole, *options.get('ignored_params', ())}
    for unit in units:
        fully_shard(unit, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    trained = [p for p in whole if p.requires_grad]
    if trained:
        _average_gradients(model, trained, None if mesh is None else mesh.get_group())
    for unit, following in zip(units, units[1:], strict=False):
        unit[0].set_modules_to_forward_prefetch([following[0]])
    return model


def _average_gradients(model: nn.Module, params: list[nn.Parameter],
                       group: dist.ProcessGroup | None) -> None:
    """Average the gradients of ``params`` over the processes at the end of each backward in which
    FSDP2 exchanges those of ``model``."""
    size, given = dist.get_world_size(group), set()
    states = [m._get_fsdp_state() for m in model.modules() if hasattr(m, '_get_fsdp_state')]
    sharded = next((state._fsdp_param_group for state in states if state._fsdp_param_group), None)
    if sharded is None:
        raise ValueError('whole_below leaves no parameter to shard')

    def average():
        found = [p.grad if p in given else None for p in params]
        given.clear()
        # What has no gradient here may have one elsewhere: all processes exchange the same.
        flat = torch.cat([(torch.zeros_like(p) if grad is None else grad).flatten()
                          for p, grad in zip(params, found, strict=True)])
        dist.all_reduce(flat.div_(size), group=group)
        pairs = [(grad, part.view_as(p)) for p, grad, part in zip(
            params, found, flat.split([p.numel() for p in params]), strict=True)
            if grad is not None]
        torch._foreach_copy_(*map(list, zip(*pairs, strict=True)))

    def note(param):
        if not sharded.reduce_grads:  # set_requires_gradient_sync(False): more is to come
            return
        if not given:
            torch.autograd.Variable._execution_engine.queue_callback(torch.no_grad()(average))
        given.add(param)

    for param in params:
        param.register_post_accumulate_grad_hook(note)


def _units_of(model: nn.Module, size: int) -> Iterator[list[nn.Module]]:
    """Each stage; else neighbouring blocks of at most so many parameters, or one of more."""
    stages = [module for module in model.modules() if isinstance(module, Stage)]
    if stages:
        yield from ([stage] for stage in stages)
        return
    unit, total = [], 0
    for name, module in model.named_modules():
        if name.rpartition('.')[2] != 'blocks':
            continue
        for block in module:
            count = sum(p.numel() for p in block.parameters())
            if unit and total + count > size:
                yield unit
                unit, total = [], 0
            unit.append(block)
            total += count
    if unit:
        yield unit


def on_shards(optimizer: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """A class of optimizers that see each process's shards of parameters as plain tensors.

    torch works out for every tensor of every step how it is sharded, which for the 500 of VMamba-B
    takes Python longer than the GPU takes for the forward. For what treats each element by itself,
    as SGD and AdamW do, the shards are all there is to see. Not for optimizers or clipping that
    look at a whole tensor. ``state_dict`` holds this process's shards: each process saves its own.

    Args:
        optimizer: its class, such as ``torch.optim.AdamW``.
    """
    class OnShards(optimizer):
        def __init__(self, params: Iterable, *args, **kwargs):
            groups = list(params)
            if groups and not isinstance(groups[0], dict):
                groups = [dict(params=groups)]
            # A shard of a tensor with few rows can be empty.
            pairs = [[(p, local) for p in group['params']
                      if (local := nn.Parameter(_local(p.detach()), p.requires_grad)).numel()]
                     for group in groups]
            self._wholes = [p for group in groups for p in group['params']]
            self._pairs = [pair for group in pairs for pair in group]
            super().__init__([{**group, 'params': [local for _, local in pairs_of_group]}
                              for group, pairs_of_group in zip(groups, pairs, strict=True)],
                             *args, **kwargs)

        def step(self, closure: Callable | None = None):
            with torch.no_grad():
                for whole, local in self._pairs:
                    local.grad = None if whole.grad is None else _local(whole.grad)
            return super().step(closure)

        def zero_grad(self, set_to_none: bool = True) -> None:
            for whole in self._wholes:
                if set_to_none:
                    whole.grad = None
                elif whole.grad is not None:
                    whole.grad.zero_()
            super().zero_grad(set_to_none)

    OnShards.__name__ = OnShards.__qualname__ = f'{optimizer.__name__}OnShards'
    return OnShards


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, 'to_local') else tensor
