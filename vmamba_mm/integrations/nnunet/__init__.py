"""Trainers of nnU-Net v2 for the networks of this package.

nnU-Net finds a trainer of another package by the name of its class in the folders that the
environment variable ``nnUNet_extTrainer`` lists; ``python -m vmamba_mm.nnunet`` prints this one.
It imports every module of such a folder as one of the top level, so that the modules here have
names of their own and hold trainers alone.
"""

from pathlib import Path

#: The folder with the trainers.
TRAINERS = Path(__file__).resolve().parent
