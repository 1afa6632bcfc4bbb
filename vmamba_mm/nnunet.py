"""Trainers of nnU-Net v2: :mod:`vmamba_mm.integrations.nnunet`.

``export nnUNet_extTrainer=$(python -m vmamba_mm.nnunet)`` tells nnU-Net where they are.
"""

from vmamba_mm.integrations.nnunet import TRAINERS

__all__ = ['TRAINERS']

if __name__ == '__main__':
    print(TRAINERS)
