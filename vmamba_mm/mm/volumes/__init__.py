"""Volumes of medical imaging: data sets, transforms and metrics, by MONAI where it has them."""
