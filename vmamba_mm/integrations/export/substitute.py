"""A model of mm* whose network is run by an exported file, for its tests and predictions."""

import copy

from torch import Tensor, nn

from vmamba_mm.integrations.export.network import Network
from vmamba_mm.integrations.export.targets import Run


def run_by(model: nn.Module, run: Run) -> nn.Module:
    """A copy of a model that gets by ``run`` what :class:`Network` of it calculates.

    Args:
        model: a classifier, a detector or a segmentor.
        run: of a file, as a target's ``load`` gives it.
    """
    kind = Network(copy.copy(model)).kind
    model = copy.deepcopy(model)
    whole = kind != 'detector'

    def extract_feat(inputs: Tensor, *args, **kwargs):
        outputs = run(inputs.contiguous())
        return outputs[0] if whole else tuple(outputs)

    model.extract_feat = extract_feat
    if whole:  # the head gets what it would have calculated
        head = model.head if kind == 'classifier' else model.decode_head
        head.forward = lambda outputs: outputs
    return model
