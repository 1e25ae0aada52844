"""Calibration text, evaluation text and hidden states."""

from lightning_gsq.data.activations import ActivationDataset, ActivationOptions, ActivationStore
from lightning_gsq.data.calibration import CalibrationDataModule
from lightning_gsq.data.evaluation import PerplexityData
from lightning_gsq.data.local_shards import LocalShards
from lightning_gsq.data.mixture import Mixture
from lightning_gsq.data.samples import ModelSamples
from lightning_gsq.data.shards import HuggingFaceDataset
from lightning_gsq.data.sources import PythonDocumentation, TextSource
from lightning_gsq.data.text_files import TextFile

__all__ = [
    "ActivationDataset",
    "ActivationOptions",
    "ActivationStore",
    "CalibrationDataModule",
    "HuggingFaceDataset",
    "LocalShards",
    "Mixture",
    "ModelSamples",
    "PerplexityData",
    "PythonDocumentation",
    "TextFile",
    "TextSource",
]
