"""Calibration text, evaluation text and hidden states."""

from lightning_gsq.data.activations import ActivationDataset, ActivationOptions, ActivationStore
from lightning_gsq.data.calibration import CalibrationDataModule
from lightning_gsq.data.evaluation import PerplexityData
from lightning_gsq.data.sources import (
    HuggingFaceDataset,
    Mixture,
    ModelSamples,
    PythonDocumentation,
    TextFile,
    TextSource,
)

__all__ = [
    "ActivationDataset",
    "ActivationOptions",
    "ActivationStore",
    "CalibrationDataModule",
    "HuggingFaceDataset",
    "Mixture",
    "ModelSamples",
    "PerplexityData",
    "PythonDocumentation",
    "TextFile",
    "TextSource",
]
