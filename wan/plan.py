"""What a generation with Wan will cost: operations, bytes of each stage, and which options make it fit.

Everything comes from headers. Weights are counted in the model as it is going to be loaded, but without its weights;
what its work takes is counted in `wan/costs.py` and `wan/memory.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from common.weights import Checkpoint
from modules.compute import dtype_name
from modules.denoising_plan import Denoising, TransformerOptions
from modules.guidance import StepGuidance, needs_negative, plan_guidance
from modules.plan import NOT_COUNTED, Change, Flops, Rung, RunPlan, Stage, report_for
from modules.transformer_plan import EmptyTransformers
from modules.weight_sizes import whole_weights
from networks.lora_merge import LoraMerge
from options.geometry import FRAMES_PER_LATENT
from options.memory_size import MemorySize
from options.wan_request import WanRequest
from wan.checkpoints import WanCheckpoints
from wan.compute import Compute
from wan.config import WanConfig
from wan.costs import Tokens, WanCosts, num_features, num_target_frames
from wan.loading import FLOAT32, build_transformer
from wan.memory import VaeWork, decode_bytes, encode_bytes, t5_weights, t5_work
from wan.sampling import joins_passes
from wan.swapping import swap_limits
from wan.text_encoder import prompt_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def empty_transformers(checkpoint: Checkpoint, merge: LoraMerge | None, dtype: torch.dtype) -> EmptyTransformers:
    """For every mode of fp8, with the layers that LoRAs are merged into."""
    limits = swap_limits(WanConfig.from_checkpoint(checkpoint))
    return EmptyTransformers(
        lambda fp8: build_transformer(checkpoint, fp8=fp8, merge=merge), limits=limits, dtype=dtype, float32=FLOAT32
    )


@dataclass(frozen=True, kw_only=True)
class MemoryOptions(TransformerOptions):
    """What users can choose about a generation's memory."""

    fp8_t5: bool = False
    vae_cache_cpu: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class GenerationPlan:
    """One request on one device."""

    files: WanCheckpoints
    request: WanRequest
    num_text: int
    """UMT5's tokens of the longest prompt."""
    costs: WanCosts
    guidance: Sequence[StepGuidance]
    """Of every step."""
    denoising: Denoising
    compute: Compute
    options: MemoryOptions
    """What the flags say about memory; where they leave something open, nothing is swapped."""

    def text(self, size: MemorySize) -> str:
        """The whole report."""
        options = self.options
        plan = RunPlan(
            title=self._title(),
            tokens=self.costs.by_group(),
            compute=self._compute(),
            stages=self.stages(options),
            notes=self._notes(),
        )
        return report_for(size, plan, options, self.ladder, self.stages)

    # ---- operations ----

    def _compute(self) -> list[tuple[str, Flops]]:
        once = self.denoising.once_flops
        return [("a pass", self.costs.step_flops()), ("once", once), ("in all", once + self._passes_flops())]

    def _passes_flops(self) -> Flops:
        """Of all steps; skip-layer guidance leaves blocks out."""
        total = Flops()
        for step in self.guidance:
            for name in step.passes:
                num_skipped = len(set(step.skipped_blocks)) if name == "skipping" else 0
                total += self.costs.without(num_skipped).step_flops()
        return total

    @property
    def num_operations(self) -> int:
        """Of the whole request."""
        return self._compute()[-1][1].total

    # ---- bytes ----

    def stages(self, options: MemoryOptions) -> list[Stage]:
        """In their order; models are on the device for their own stage only."""
        return [*self._encoding(options), *self.denoising.stages(options), self._decoding(options)]

    def needed(self, num_blocks: int, offload: bool) -> int:
        """What `choose_swap` asks."""
        return self.denoising.needed(self.options, num_blocks, offload)

    def _encoding(self, options: MemoryOptions) -> Iterator[Stage]:
        files, compute, request = self.files, self.compute, self.request
        t5 = {"itemsize": compute.t5_dtype.itemsize, "fp8": options.fp8_t5}
        work = t5_work(files.t5, self.num_text, **t5)
        yield Stage(name="UMT5", parts=(("weights", t5_weights(files.t5, **t5)), ("work", work)))
        if files.clip is not None:
            weights = whole_weights(files.clip, itemsize=compute.clip_dtype.itemsize)
            yield Stage(name="CLIP", parts=(("weights", weights),))
        if request.task.kind != "t2v":
            # A control clip is as long as what is made, an appended end image is not encoded with the clip before it.
            num_frames = request.num_frames if request.control_path is None else self._num_frames
            work = encode_bytes(self._vae_work(options), num_frames, request.height, request.width)
            yield Stage(name="VAE encoding", parts=(("weights", self._vae_weights), ("work", work)))

    def _decoding(self, options: MemoryOptions) -> Stage:
        request, work = self.request, self._vae_work(options)
        work = decode_bytes(work, num_target_frames(request), request.height, request.width)
        return Stage(name="VAE decoding", parts=(("weights", self._vae_weights), ("work", work)))

    @property
    def _num_frames(self) -> int:
        """Pixel frames that are made."""
        return FRAMES_PER_LATENT * (num_target_frames(self.request) - 1) + 1

    @cached_property
    def _vae_weights(self) -> int:
        return whole_weights(self.files.vae, itemsize=self.compute.vae_dtype.itemsize)

    def _vae_work(self, options: MemoryOptions) -> VaeWork:
        itemsize = self.compute.vae_dtype.itemsize
        return VaeWork.of(self.files.vae, itemsize=itemsize, cache_on_cpu=options.vae_cache_cpu)

    # ---- what can be done ----

    def ladder(self) -> list[Rung[MemoryOptions]]:
        """The cheapest first. What the flags ask for already is not on it."""
        options, denoising = self.options, self.denoising
        t5 = Change(flag="--fp8_t5", apply=lambda o: replace(o, fp8_t5=True))
        cache = Change(flag="--vae_cache_cpu", apply=lambda o: replace(o, vae_cache_cpu=True))
        return [
            denoising.offload_rung(options),
            denoising.fp8_rung(options),
            [] if options.fp8_t5 else [t5],
            denoising.swap_rung(options),
            [] if options.vae_cache_cpu else [cache],
        ]

    # ---- words ----

    def _title(self) -> str:
        request, compute = self.request, self.compute
        kind = f"{self._num_frames} frames"
        if request.is_picture:
            kind = "one frame" if request.one_frame is not None else "one picture"
        num_passes = sum(len(step.passes) for step in self.guidance)
        what = f"{kind} of {request.width}x{request.height}, {request.num_steps} steps, {num_passes} passes"
        types = {"transformer": self.denoising.transformers.dtype, "UMT5": compute.t5_dtype}
        types |= {"CLIP": compute.clip_dtype} if self.files.clip is not None else {}
        types |= {"VAE": compute.vae_dtype}
        return f"{what}; {', '.join(f'{name} in {dtype_name(dtype)}' for name, dtype in types.items())}"

    def _notes(self) -> list[str]:
        num_rows = num_features(self.costs.config)
        image = f" and {num_rows} of CLIP features" if num_rows else ""
        seen = f"each token also sees {self.costs.config.text_length} rows of text{image}"
        return [seen, f"not in it: {NOT_COUNTED}"]


def plan_generation(
    checkpoints: WanCheckpoints,
    compute: Compute,
    request: WanRequest,
    transformers: EmptyTransformers,
    *,
    tokenizer: PreTrainedTokenizerBase,
) -> GenerationPlan:
    """What `compute` would do with `request`.

    Args:
        tokenizer: UMT5's, which counts the prompts' tokens.
    """
    guidance = plan_guidance(request.num_steps, request.cfg_scale, request.guidance)
    prompts = [request.prompt, *([request.negative_prompt] if needs_negative(guidance) else [])]
    costs = WanCosts(config=WanConfig.from_checkpoint(checkpoints.transformer), tokens=Tokens.of(request))
    num_swapped, offload = next(compute.swap.choices(transformers.limits))
    return GenerationPlan(
        files=checkpoints,
        request=request,
        num_text=max(len(prompt_tokens(tokenizer, prompt)) for prompt in prompts),
        costs=costs,
        guidance=guidance,
        denoising=Denoising(
            transformers=transformers,
            costs=costs,
            swap=compute.swap,
            num_steps=request.num_steps,
            # A skipping pass uses what is prepared for the negative one.
            num_passes=len(prompts),
            joins_passes=joins_passes(request),
            lora_bytes=sum(Path(lora.path).stat().st_size for lora in request.loras),
        ),
        compute=compute,
        options=MemoryOptions(
            fp8=compute.fp8,
            num_blocks=num_swapped,
            offload=offload,
            fp8_t5=compute.fp8_t5,
            vae_cache_cpu=compute.vae_cache_cpu,
        ),
    )
