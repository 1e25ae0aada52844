"""The model to quantize, with every setting that concerns it; evaluated by its perplexity."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_gsq.models import loading
from lightning_gsq.quantizers import RTN, FromFile, GumbelOptions, WarmStart
from lightning_gsq.saliency import SettleOptions
from lightning_gsq.system.slices import slices
from lightning_gsq.training import settings
from lightning_gsq.training.losses import LOSS_POSITIONS, loss_mean, refuse_non_finite
from lightning_gsq.training.outer_options import AUTO, OuterOptions, outer
from lightning_gsq.training.selection import Selection
from lightning_gsq.training.target import TargetName
from lightning_gsq.weights.assignment import SchemeOverride
from lightning_gsq.weights.scheme import QuantScheme


class ModelQuantization(LightningModule):
    """A causal decoder and how to quantize it.

    Args:
        pretrained: Local folder with config.json and safetensors, GGUF file, name on the Hugging Face hub, or
            package://module/file.gguf; for validate also a run folder or an exported one.
        scheme: How every weight is quantized: settings, the name of a preset (w3g64, q4_k, iq4_nl, mlx4g64), or file:
            each as the file of the start FromFile has it.
        include: Patterns of the weights to quantize, matched against names such as model.layers.3.mlp.down_proj.
        exclude: Patterns of weights to leave in full precision.
        overrides: Presets, or single settings, for the weights that a pattern names.
        fallback: Quantize rows that a preset's type does not hold as llama.cpp does: to the type that it takes instead.
            Otherwise they are refused.
        embedding: How the embedding is quantized, and with it a head that is tied to it; "auto" for 8 bits in groups of
            32 where its rows are whole groups, and for the file's own with the start FromFile; null leaves it in 16
            bits, also where a size is given.
        head: How a head with a matrix of its own is quantized; null leaves it in 16 bits, unless a size is given.
        size: Size of the whole file, in place of a width: 80MB, or 2.6bpw (true bits over all parameters). Every
            matrix, the embedding and the head get one of the choices; overrides, embedding, head and exclude pin what
            they name. The file is that of the first of gguf and native in --export, native without one.
        choices: Presets to choose from; null for q2_k, q3_k, q4_k, q5_k, q6_k and q8_0 in a gguf file, and w2g64,
            w3g64, w3g32, w4g64, w4g32, w5g64, w6g64 and w8g64 in a native one.
        blocks: Range of blocks to quantize, such as 0:4; null for all.
        phases: What to do: "init", the warm start of the whole model and its perplexity; "blocks", training block by
            block; "end_to_end", training the scales of the whole model. A phase that was left out can be run later on
            the same run folder.
        target: What a block learns to output: "stream", the full-precision model's own activations at that depth, or
            "local", the full-precision block applied to the quantized model's activations.
        inherited_error: Error that a token may bring into a block before it counts less there, in energies of a typical
            token (target stream); at this error it counts half. Matters where few tokens carry massive activations
            that low bits get wrong; null: all tokens count alike.
        warm_start: Codes and scales that training starts from; null for RTN with scales weighted by the inputs.
        hessian_sequences: Calibration sequences whose inputs the warm start sees.
        end_loss_weights: Weigh the tokens of these inputs, for each matrix, by the squared gradient of the end loss at
            its outputs: errors count as they reach the model's predictions. Two passes more over these sequences, one
            of them backwards, before the first block.
        imatrix: Importance matrix of llama.cpp (GGUF or .dat) that weighs errors in place of these inputs, for the
            starts RTN and LlamaCpp.
        save_imatrix: Write the inputs' mean squares in the full-precision model as such a matrix: imatrix.gguf in the
            run folder.
        moe_calibrate_all_experts: Send every token to every routed expert while the inputs are watched, whatever the
            router says; nothing else sees that.
        moe_min_tokens_per_expert: Tokens that each routed expert should see there. For experts with fewer, more
            sequences of the same text are passed through; null for none.
        moe_max_extra_sequences: How many more sequences at most; those that train but are not watched come first.
        saliency: How the salient part of each matrix is chosen, where the scheme has one or a budget.
        gumbel: How the logits start and how noisy their samples are.
        optimizer: Optimizer of the logits and scales; lr is the logits' learning rate.
        scale_learning_rate: Learning rate of the scales, relative to each scale.
        learning_rate_floor: End of the cosine learning rate schedule, as a share of its start.
        compile_blocks: Run blocks through torch.compile where a compiler is there: some tens of seconds at the start,
            then a quarter less time a block on a CPU.
        expert_parallel: With several devices, each holds, rounds and trains its own routed experts of a block, and
            tokens go to all of them; for blocks of experts that one device does not hold.
        scale_dtype: Stored dtype of the scales.
        dtype: Dtype the model is loaded in; "auto" keeps that of its files (float32 for GGUF).
        output_dtype: Dtype of the dequantized model that a run saves.
        revision: Branch, tag or commit on the hub.
        trust_remote_code: Run Python code that comes with the model.
    """

    def __init__(
        self,
        pretrained: str,
        scheme: QuantScheme = QuantScheme(),  # noqa: B008 - frozen
        include: list[str] = ["*"],  # noqa: B006 - jsonargparse shows the default; never changed
        exclude: list[str] = [],  # noqa: B006
        overrides: dict[str, SchemeOverride | str] = {},  # noqa: B006
        fallback: bool = False,
        embedding: QuantScheme | str | None = None,
        head: QuantScheme | str | None = None,
        size: str | None = None,
        choices: list[str] | None = None,
        blocks: str | None = None,
        phases: list[settings.Phase] = ["init", "blocks", "end_to_end"],  # noqa: B006
        target: TargetName = "stream",
        inherited_error: float | None = None,
        warm_start: WarmStart | None = None,
        hessian_sequences: int = 64,
        end_loss_weights: bool = False,
        imatrix: str | None = None,
        save_imatrix: bool = False,
        moe_calibrate_all_experts: bool = False,
        moe_min_tokens_per_expert: int | None = None,
        moe_max_extra_sequences: int = 256,
        saliency: SettleOptions = SettleOptions(),  # noqa: B008 - frozen
        gumbel: GumbelOptions = GumbelOptions(),  # noqa: B008 - frozen
        optimizer: OptimizerCallable = lambda groups: torch.optim.Adam(groups, lr=1e-3),
        scale_learning_rate: float = 3e-3,
        learning_rate_floor: float = 0.1,
        compile_blocks: bool = False,
        expert_parallel: bool = False,
        scale_dtype: settings.ScaleDtype = "float16",
        dtype: loading.Dtype = "auto",
        output_dtype: settings.OutputDtype = "bfloat16",
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        settings.check_phases(phases)
        self.phases = phases
        self.address = settings.Address(pretrained, revision, trust_remote_code, dtype)
        schemes = {pattern: settings.override(pattern, value) for pattern, value in overrides.items()}
        self.selection = Selection(scheme, include, exclude, schemes, blocks, fallback)
        self.start = settings.StartOptions(
            warm_start or RTN(),
            hessian_sequences,
            saliency,
            imatrix,
            save_imatrix,
            settings.ExpertOptions(moe_calibrate_all_experts, moe_min_tokens_per_expert, moe_max_extra_sequences),
            end_loss_weights,
        )
        self.size = settings.size_of(size, choices, scheme, self.start.warm_start)
        # A file that is refined keeps its own; where a size is given, it is chosen like the others.
        left_open = embedding == AUTO and (isinstance(warm_start, FromFile) or self.size is not None)
        self.outer = OuterOptions(
            None if left_open else outer("embedding", embedding, scheme),
            outer("head", head, scheme),
            fallback,
            automatic=embedding == AUTO,
            kept=embedding is None,
            selection=self.selection,
        )
        self.block = settings.BlockOptions(
            settings.target_of(target),
            inherited_error,
            gumbel,
            optimizer,
            scale_learning_rate,
            learning_rate_floor,
            compile_blocks,
            expert_parallel,
        )
        self.storage = settings.StorageOptions(getattr(torch, scale_dtype), getattr(torch, output_dtype))
        self.negative_log_likelihood = loss_mean()
        self.window_losses: dict[int, tuple[float, int]] = {}
        """Sum of the losses of each evaluation window of this process, and their number; since the last clearing."""
        self.network: PreTrainedModel
        self.tokenizer: PreTrainedTokenizerBase

    @property
    def follows(self) -> bool:
        """Whether the warm start follows the full-precision model, whose hidden states it then needs too."""
        start = self.start
        return start.watches_inputs and start.warm_start.following is not None and self.block.target.follows_original

    def take(self, widths: Mapping[str, str], name: str = "") -> None:
        """Gives matrices the presets that were chosen for them.

        Args:
            widths: Names of presets, by full parameter name.
            name: What the whole is called.
        """
        self.selection = dataclasses.replace(self.selection, chosen=dict(widths), name=name)
        self.outer = dataclasses.replace(self.outer, selection=self.selection)

    def load(self, source: loading.ModelSource, quantized: bool = False, scratch: Path | None = None) -> None:
        """Fills ``tokenizer`` and ``network``; arguments as of :func:`loading.load_model`."""
        self.tokenizer = loading.load_tokenizer(source)
        self.network = loading.load_model(source, self.address.dtype, quantized, scratch)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Adds the predictions of a window ``1 T`` of token ids, its first token being context only."""
        logits_TV, target_T = self.network(batch, use_cache=False).logits[0, :-1], batch[0, 1:]
        for part in slices(len(target_T), LOSS_POSITIONS):
            self.add_predictions(logits_TV[part], target_T[part], batch_idx)

    def add_predictions(self, logits_NV: Tensor, target_N: Tensor, window: int) -> None:
        """Adds what the logits of some positions say of the tokens that follow them.

        Raises:
            NonFiniteLossError: their loss is NaN or infinite, so that the window has no perplexity.
        """
        loss = nn.functional.cross_entropy(logits_NV.float(), target_N)
        refuse_non_finite(
            loss,
            f"the loss of evaluation window {window + 1}",
            "a weight of the model is not finite, or its activations overflow in "
            f"{str(self.network.dtype).removeprefix('torch.')}: see --model.dtype and --trainer.precision",
        )
        self.negative_log_likelihood.update(loss, weight=len(target_N))
        total, count = self.window_losses.get(window, (0.0, 0))
        self.window_losses[window] = total + float(loss) * len(target_N), count + len(target_N)

    def on_validation_epoch_end(self) -> None:
        """Logs the perplexity of all windows."""
        self.log("perplexity", self.negative_log_likelihood.compute().exp())
        self.negative_log_likelihood.reset()
