"""Image restoration on mmengine: data, degradations, metrics, tiles, models."""
