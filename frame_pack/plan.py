"""What a generation with FramePack will cost: operations, bytes of each stage, and which options make it fit.

Everything comes from headers. Weights are counted in the model as it is going to be loaded, but without its weights;
what its work takes is counted in `frame_pack/costs.py` and `hunyuan_model/memory.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from common.weights import Checkpoint
from frame_pack.config import FramePackConfig
from frame_pack.costs import FramePackCosts, Tokens, context_of
from frame_pack.loading import FramePackCheckpoints, build_transformer
from frame_pack.swapping import swap_limits
from hunyuan_model.memory import VaeWork, decode_bytes, encode_bytes, llama_weights, llama_work
from hunyuan_model.text_encoders import prompt_tokens
from modules.denoising_plan import Denoising, TransformerOptions
from modules.plan import NOT_COUNTED, Change, Flops, Rung, RunPlan, Stage, report_for
from modules.transformer_plan import EmptyTransformers
from modules.weight_sizes import whole_weights
from networks.lora_merge import LoraMerge
from options.fpack_request import FramePackRequest
from options.memory_size import MemorySize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from frame_pack.compute import Compute

CHUNK = 32
"""Columns, where the plan suggests chunks."""
TILE = 256
"""What `--vae_tiling` alone means."""


def empty_transformers(checkpoint: Checkpoint, merge: LoraMerge | None, dtype: torch.dtype) -> EmptyTransformers:
    """For every mode of fp8, with the layers that LoRAs are merged into."""
    limits = swap_limits(FramePackConfig.from_checkpoint(checkpoint))
    return EmptyTransformers(
        lambda fp8: build_transformer(checkpoint, fp8=fp8, merge=merge), limits=limits, dtype=dtype
    )


@dataclass(frozen=True, kw_only=True)
class MemoryOptions(TransformerOptions):
    """What users can choose about a generation's memory."""

    fp8_llm: bool = False
    tile_size: int | None = None
    chunk_size: int | None = None


@dataclass(frozen=True, kw_only=True)
class PromptLength:
    """Tokens of the longest prompt of a request."""

    num_rows: int
    """That reach the transformer."""
    num_prefix: int
    """That LLaMA reads before."""


@dataclass(frozen=True, kw_only=True, eq=False)
class GenerationPlan:
    """One request on one device."""

    files: FramePackCheckpoints
    request: FramePackRequest
    prompt: PromptLength
    section: Denoising
    """One of all, which take equally much."""
    options: MemoryOptions
    """What the flags say about memory; where they leave something open, nothing is swapped."""
    encoder_dtype: torch.dtype
    """Of the VAE, too."""
    bulk_decode: bool = False

    def text(self, size: MemorySize) -> str:
        """The whole report."""
        options = self.options
        plan = RunPlan(
            title=self._title(),
            tokens=self.section.costs.by_group(),
            compute=self._compute(),
            stages=self.stages(options),
            notes=self._notes(),
        )
        return report_for(size, plan, options, self.ladder, self.stages)

    # ---- operations ----

    def _compute(self) -> list[tuple[str, Flops]]:
        step, once, num_sections = self.section.step_flops, self.section.once_flops, self.request.num_sections
        everything = (step * self.request.num_steps + once) * num_sections
        return [("a step", step), ("a section once" if num_sections > 1 else "once", once), ("in all", everything)]

    @property
    def num_operations(self) -> int:
        """Of the whole request."""
        return self._compute()[-1][1].total

    # ---- bytes ----

    def stages(self, options: MemoryOptions) -> list[Stage]:
        """In their order; models are on the device for their own stage only."""
        return [*self._encoding(options), *self.section.stages(options), self._decoding(options)]

    def needed(self, num_blocks: int, offload: bool) -> int:
        """What `choose_swap` asks."""
        return self.section.needed(self.options, num_blocks, offload)

    def _encoding(self, options: MemoryOptions) -> Iterator[Stage]:
        files, itemsize, request = self.files, self.encoder_dtype.itemsize, self.request
        llama = {"itemsize": itemsize, "fp8": options.fp8_llm}
        num_tokens = self.prompt.num_prefix + self.prompt.num_rows
        work = llama_work(files.llama, num_tokens, **llama)
        yield Stage(name="LLaMA", parts=(("weights", llama_weights(files.llama, **llama)), ("work", work)))
        yield Stage(name="CLIP", parts=(("weights", whole_weights(files.clip, itemsize=itemsize)),))
        yield Stage(name="SigLIP", parts=(("weights", whole_weights(files.siglip, itemsize=itemsize)),))
        encoding = encode_bytes(self._vae_work(options), 1, request.height, request.width)
        yield Stage(name="VAE encoding", parts=(("weights", self._vae_weights), ("work", encoding)))

    def _decoding(self, options: MemoryOptions) -> Stage:
        request = self.request
        window, num_latents = request.latent_window_size, 1
        if request.one_frame is None:
            num_latents = request.num_sections * window + 1
            num_latents = num_latents if self.bulk_decode else min(num_latents, 2 * window + 1)
        work = decode_bytes(self._vae_work(options), num_latents, request.height, request.width)
        return Stage(name="VAE decoding", parts=(("weights", self._vae_weights), ("work", work)))

    @cached_property
    def _vae_weights(self) -> int:
        return whole_weights(self.files.vae, itemsize=self.encoder_dtype.itemsize)

    def _vae_work(self, options: MemoryOptions) -> VaeWork:
        sizes = {"tile_size": options.tile_size, "chunk_size": options.chunk_size}
        return VaeWork.of(self.files.vae, itemsize=self.encoder_dtype.itemsize, **sizes)

    # ---- what can be done ----

    def ladder(self) -> list[Rung[MemoryOptions]]:
        """The cheapest first. What the flags ask for already is not on it."""
        options, section = self.options, self.section
        llama = Change(flag="--fp8_llm", apply=lambda o: replace(o, fp8_llm=True))
        chunks = Change(flag=f"--vae_chunk_size {CHUNK}", apply=lambda o: replace(o, chunk_size=CHUNK))
        tiles = Change(flag="--vae_tiling", apply=lambda o: replace(o, tile_size=TILE))
        return [
            section.offload_rung(options),
            section.fp8_rung(options),
            [] if options.fp8_llm else [llama],
            section.swap_rung(options),
            [] if options.chunk_size else [chunks],
            [] if options.tile_size and options.tile_size <= TILE else [tiles],
        ]

    # ---- words ----

    def _title(self) -> str:
        request = self.request
        count = request.num_sections
        kind = f"{count} section{'' if count == 1 else 's'}" if request.one_frame is None else "one frame"
        types = (self.section.transformers.dtype, self.encoder_dtype)
        names = [str(dtype).removeprefix("torch.") for dtype in types]
        passes = ", two passes a step" if self.section.num_passes == 2 else ""
        where = f"transformer in {names[0]}, encoders and VAE in {names[1]}"
        return f"{kind} of {request.width}x{request.height}, {request.num_steps} steps{passes}; {where}"

    def _notes(self) -> list[str]:
        return [f"not in it: {NOT_COUNTED}"]


def plan_generation(
    checkpoints: FramePackCheckpoints,
    compute: Compute,
    request: FramePackRequest,
    transformers: EmptyTransformers,
    *,
    tokenizer: PreTrainedTokenizerBase,
) -> GenerationPlan:
    """What `compute` would do with `request`.

    Args:
        tokenizer: LLaMA's, which counts the prompts' tokens.
    """
    prompt = _longest_prompt(request, tokenizer)
    num_image = checkpoints.siglip.shape("embeddings.position_embedding.weight", 2)[0]
    tokens = Tokens.of(context_of(request), num_text=prompt.num_rows, num_image=num_image)
    num_swapped, offload = next(compute.swap.choices(transformers.limits))
    return GenerationPlan(
        files=checkpoints,
        request=request,
        prompt=prompt,
        section=Denoising(
            transformers=transformers,
            costs=FramePackCosts(config=FramePackConfig.from_checkpoint(checkpoints.transformer), tokens=tokens),
            swap=compute.swap,
            num_steps=request.num_steps,
            num_passes=2 if request.uses_cfg else 1,
            lora_bytes=sum(Path(lora.path).stat().st_size for lora in request.loras),
        ),
        options=MemoryOptions(
            fp8=compute.fp8,
            fp8_llm=compute.fp8_llm,
            num_blocks=num_swapped,
            offload=offload,
            tile_size=compute.vae_tile_size,
            chunk_size=compute.vae_chunk_size,
        ),
        encoder_dtype=compute.encoder_dtype,
        bulk_decode=compute.bulk_decode,
    )


def _longest_prompt(request: FramePackRequest, tokenizer: PreTrainedTokenizerBase) -> PromptLength:
    prompts = [*request.prompts.values(), *([request.negative_prompt] if request.uses_cfg else [])]
    read = [prompt_tokens(tokenizer, prompt, system_prompt=request.system_prompt) for prompt in prompts]
    ids, num_prefix = max(read, key=lambda found: len(found[0]))
    return PromptLength(num_rows=len(ids) - num_prefix, num_prefix=num_prefix)
