"""Ops registered from annotated functions: what ``vss_block`` uses until ``define_op`` has it."""

from collections.abc import Callable

import torch
from torch.utils.flop_counter import register_flop_formula

from vmamba_mm.ops.core import define_op


def register(name: str, *, fake: Callable, backward: Callable | None = None,
             setup_context: Callable | None = None, results: int = 1) -> Callable:
    def decorate(function):
        schema = torch.library.infer_schema(function, mutates_args=())
        dispatch, run_eagerly = define_op._register(name, schema, function, fake, backward,
                                                    setup_context, results)

        def call(*args):
            return dispatch(*args) if define_op.is_watched(args) else run_eagerly(None, *args)

        return call

    return decorate


def flop_formula(*names: str) -> Callable:
    ops = getattr(torch.ops, define_op.NAMESPACE)
    return register_flop_formula([getattr(ops, n) for name in names for n in (name, f'_{name}')])
