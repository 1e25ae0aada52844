"""What transformers calls while it loads a native folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.packed.config import METHOD, GSQConfig
from lightning_gsq.packed.exchange import check_stored, exchange_modules
from lightning_gsq.packed.layers import PackedWeight
from lightning_gsq.packed.salient_linear import SageLinear
from lightning_gsq.system.safetensors_headers import read_headers

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@register_quantizer(METHOD)
class GSQQuantizer(HfQuantizer):
    """What transformers calls while it loads a native folder."""

    requires_calibration = True  # a model becomes one of these by a run, not by loading
    quantization_config: GSQConfig

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        layouts, files = self.quantization_config.layouts(), [Path(file) for file in checkpoint_files or []]
        root = Path(model.config._name_or_path)
        outside = [file for file in files if root.is_dir() and file.parent.resolve() != root.resolve()]
        if outside:
            raise ConfigurationError(f"model: the index in {root} names {outside[0]}, outside of that folder")
        stored = read_headers(files)
        exchange_modules(model, layouts, stored)
        check_stored(model, stored)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        for name, module in model.named_modules():
            if isinstance(module, (PackedWeight, SageLinear)):
                try:
                    module.check_values()
                except ValueError as error:
                    raise ConfigurationError(f"model: {name}: {error}") from error
            if isinstance(module, SageLinear):
                module.look_up()
        return model

    def is_serializable(self) -> bool:
        """``save_pretrained`` writes the same format again."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Codes have no gradient."""
        return False

    @property
    def is_compileable(self) -> bool:
        """``torch.compile`` and static caches work."""
        return True
