"""U-Mamba as trainers of nnU-Net v2 (2.8), by the names of the public code."""

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import Tensor, nn

from vmamba_mm.errors import UserError
from vmamba_mm.families.u_mamba import arch_of_plan
from vmamba_mm.models import UMamba


class nnUNetTrainerUMambaBot(nnUNetTrainer):
    """nnU-Net's training of the U-Mamba that has Mamba at the bottom, for 2-D and 3-D plans."""

    @staticmethod
    def build_network_architecture(plans_manager: PlansManager,
                                   configuration_manager: ConfigurationManager,
                                   num_input_channels: int, num_output_channels: int,
                                   enable_deep_supervision: bool = True) -> nn.Module:
        """The network for a plan; nnU-Net calls it in training and in prediction."""
        return _build(UMamba, 'bot', configuration_manager, num_input_channels,
                      num_output_channels, enable_deep_supervision)


class nnUNetTrainerUMambaEnc(nnUNetTrainer):
    """The same with Mamba after stages of the encoder. The network takes the plan's patch alone."""

    @staticmethod
    def build_network_architecture(plans_manager: PlansManager,
                                   configuration_manager: ConfigurationManager,
                                   num_input_channels: int, num_output_channels: int,
                                   enable_deep_supervision: bool = True) -> nn.Module:
        """The network for a plan; nnU-Net calls it in training and in prediction."""
        return _build(UMamba, 'enc', configuration_manager, num_input_channels,
                      num_output_channels, enable_deep_supervision)


class nnUNetTrainerUMambaEncNoAMP(nnUNetTrainer):
    """:class:`nnUNetTrainerUMambaEnc` in fp32, for data on which mixed precision gives NaN.

    The network runs outside autocast in prediction too; in the public code it does in training
    alone.
    """

    @staticmethod
    def build_network_architecture(plans_manager: PlansManager,
                                   configuration_manager: ConfigurationManager,
                                   num_input_channels: int, num_output_channels: int,
                                   enable_deep_supervision: bool = True) -> nn.Module:
        """The network for a plan; nnU-Net calls it in training and in prediction."""
        return _build(_FullPrecision, 'enc', configuration_manager, num_input_channels,
                      num_output_channels, enable_deep_supervision)

    def initialize(self) -> None:
        super().initialize()
        self.grad_scaler = None


class _FullPrecision(UMamba):
    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.to(self.decoder.seg_layers[0].weight.dtype))


def _build(network, variant, configuration, in_channels, num_classes, deep_supervision):
    plan = configuration.network_arch_init_kwargs
    # A plan for residual encoders counts blocks, of which the public code makes one of each conv.
    depths = plan.get('n_conv_per_stage', plan.get('n_blocks_per_stage'))
    needed = ('features_per_stage', 'kernel_sizes', 'strides', 'n_conv_per_stage_decoder')
    missing = [key for key in needed if key not in plan]
    if missing or depths is None:
        raise UserError(f'the plan is of {configuration.network_arch_class_name} and lacks '
                        f'{", ".join(missing or ["n_conv_per_stage"])}: a U-Mamba is built from '
                        'the plan of a U-Net, such as nnUNetPlans')
    arch = arch_of_plan(variant, n_conv_per_stage=depths, patch_size=configuration.patch_size,
                        **{key: plan[key] for key in needed})
    return network(arch, num_classes, in_channels, deep_supervision)
