"""Calibration text and evaluation text."""

from lightning_gsq.data.calibration import CalibrationDataModule
from lightning_gsq.data.evaluation import PerplexityData
from lightning_gsq.data.local_shards import LocalShards
from lightning_gsq.data.mixture import Mixture
from lightning_gsq.data.shards import HuggingFaceDataset
from lightning_gsq.data.sources import ModelSamples, PythonDocumentation, TextFile, TextSource

__all__ = [
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
