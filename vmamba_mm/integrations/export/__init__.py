"""Models for other runtimes: ONNX, OpenVINO, AOTInductor and TensorRT."""

from vmamba_mm.integrations.export.convert import Report, export_model
from vmamba_mm.integrations.export.targets import TARGETS

__all__ = ['TARGETS', 'Report', 'export_model']
