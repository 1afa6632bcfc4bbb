"""Clouds of points on mmengine's Runner: data sets, steps of a pipeline and metrics."""
