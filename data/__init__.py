"""Where do text and tokens come from? Plug-ins: a source of one's own is a subclass of TextSource.

sources       what a source is; Python's documentation
text_files    local text files
local_shards  local shards: Parquet, JSON lines, Arrow
shards        data sets of the Hugging Face hub; what sharded sources share
samples       text that the model itself writes
texts         text in memory
mixture       several sources
documents     what counts as a document
files         encodings, JSON lines, addresses
encoding      tokenizers and chat templates, token ids, BOS
retrying      a source that fails midway
tokens        the stream of tokens, kept in a file
calibration   calibration sequences
evaluation    windows for perplexity
"""

from lightning_gsq.data.calibration import CalibrationDataModule
from lightning_gsq.data.evaluation import PerplexityData
from lightning_gsq.data.local_shards import LocalShards
from lightning_gsq.data.mixture import Mixture
from lightning_gsq.data.samples import ModelSamples
from lightning_gsq.data.shards import HuggingFaceDataset
from lightning_gsq.data.sources import PythonDocumentation, TextSource
from lightning_gsq.data.text_files import TextFile
from lightning_gsq.data.texts import Texts

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
    "Texts",
]
