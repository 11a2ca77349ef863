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
from frame_pack.costs import (
    Tokens,
    Work,
    context_of,
    prepare_bytes,
    prepare_flops,
    prepared_bytes,
    step_bytes,
    step_flops,
)
from frame_pack.loading import FramePackCheckpoints, build_transformer
from frame_pack.model import FramePackTransformer
from frame_pack.swapping import SwapWish, most_blocks
from hunyuan_model.memory import VaeWork, decode_bytes, encode_bytes, llama_weights, llama_work
from hunyuan_model.text_encoders import prompt_tokens
from modules.block_swap import SwapOptions, device_bytes
from modules.fp8 import Fp8Linear
from modules.plan import Change, Rung, RunPlan, Stage, report_for
from networks.lora_merge import LoraMerge
from options.errors import UserError
from options.fp8 import Fp8Mode
from options.fpack_request import FramePackRequest
from options.memory_size import MemorySize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from frame_pack.pipeline import Compute

CHUNK = 32
"""Columns, where the plan suggests chunks."""
TILE = 256
"""What `--vae_tiling` alone means."""


# ---- the transformer's weights ----


@dataclass(frozen=True, kw_only=True)
class Placed:
    """Bytes of the transformer's weights on the device."""

    stays: int
    block_slots: int
    """Room for swapped blocks."""
    prepare_slots: int
    """Room for what only `prepare` needs; it is given back afterwards."""


class EmptyTransformers:
    """The transformer without weights, as it will be with fp8 or without."""

    def __init__(self, checkpoint: Checkpoint, merge: LoraMerge | None, dtype: torch.dtype) -> None:
        self._checkpoint, self._merge, self._dtype = checkpoint, merge, dtype
        self._built: dict[Fp8Mode, FramePackTransformer] = {}
        self._placed: dict[tuple[Fp8Mode, SwapOptions], Placed] = {}
        self.config = FramePackConfig.from_checkpoint(checkpoint)

    def __getitem__(self, fp8: Fp8Mode) -> FramePackTransformer:
        """Raises UserError where the file cannot be used with this mode."""
        if fp8 not in self._built:
            self._built[fp8] = build_transformer(self._checkpoint, fp8=fp8, merge=self._merge)
        return self._built[fp8]

    def accepts(self, fp8: Fp8Mode) -> bool:
        try:
            return bool(self[fp8].config)
        except UserError:
            return False

    def placed(self, fp8: Fp8Mode, swap: SwapOptions) -> Placed:
        """Where its weights are."""
        if (fp8, swap) not in self._placed:
            blocks_only = replace(swap, invariant="none")
            stays = self._size(fp8, replace(swap, ring_size=0))
            block_slots = self._size(fp8, blocks_only) - self._size(fp8, replace(blocks_only, ring_size=0))
            prepare_slots = self._size(fp8, swap) - stays - block_slots
            placed = Placed(stays=stays, block_slots=block_slots, prepare_slots=prepare_slots)
            self._placed[fp8, swap] = placed
        return self._placed[fp8, swap]

    def _size(self, fp8: Fp8Mode, swap: SwapOptions) -> int:
        return device_bytes(self[fp8], swap, self._dtype)

    def unpacked(self, fp8: Fp8Mode) -> int:
        """Bytes of the largest weight in fp8 while it is made whole: in the type of its scales, then in its own."""
        layers = [layer for layer in self[fp8].modules() if isinstance(layer, Fp8Linear)]
        return max((self._whole(layer) for layer in layers), default=0)

    def _whole(self, layer: Fp8Linear) -> int:
        scale = layer.scale_weight
        between = 0 if scale is None or scale.dtype == self._dtype else scale.dtype.itemsize
        return layer.weight.numel() * (self._dtype.itemsize + between)


# ---- generation ----


@dataclass(frozen=True, kw_only=True)
class MemoryOptions:
    """What users can choose about a generation's memory."""

    fp8: Fp8Mode = "off"
    fp8_llm: bool = False
    num_blocks: int = 0
    """Of `--blocks_to_swap`."""
    offload: bool = False
    """`--offload_invariant always`."""
    tile_size: int | None = None
    chunk_size: int | None = None


@dataclass(frozen=True, kw_only=True)
class PlannedTypes:
    """Bytes of a number."""

    transformer: torch.dtype
    encoders: torch.dtype


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
    tokens: Tokens
    prompt: PromptLength
    types: PlannedTypes
    swap: SwapWish
    """What the flags say about swapping."""
    options: MemoryOptions
    """What they say about memory; where `swap` leaves something open, nothing is swapped."""
    transformers: EmptyTransformers
    lora_bytes: int = 0
    """Of the prompt's own LoRAs."""
    bulk_decode: bool = False

    def text(self, size: MemorySize) -> str:
        """The whole report."""
        options = self.options
        plan = RunPlan(
            title=self._title(),
            tokens=self.tokens.by_group(),
            compute=self._compute(),
            stages=self.stages(options),
            notes=self._notes(),
        )
        return report_for(size, plan, options, self.ladder, self.stages)

    # ---- operations ----

    @cached_property
    def _num_passes(self) -> int:
        return 2 if self.request.uses_cfg else 1

    def _compute(self) -> list:
        request, step = self.request, step_flops(self.transformers.config, self.tokens) * self._num_passes
        once = prepare_flops(self.transformers.config, self.tokens, num_steps=request.num_steps) * self._num_passes
        everything = (step * request.num_steps + once) * request.num_sections
        one = "a section once" if request.num_sections > 1 else "once"
        return [("a step", step), (one, once), ("in all", everything)]

    @property
    def num_operations(self) -> int:
        """Of the whole request."""
        return self._compute()[-1][1].total

    # ---- bytes ----

    def stages(self, options: MemoryOptions) -> list[Stage]:
        """In their order; models are on the device for their own stage only."""
        return [*self._encoding(options), *self.denoising(options), self._decoding(options)]

    def _encoding(self, options: MemoryOptions) -> Iterator[Stage]:
        files, itemsize, request = self.files, self.types.encoders.itemsize, self.request
        llama = {"itemsize": itemsize, "fp8": options.fp8_llm}
        num_tokens = self.prompt.num_prefix + self.prompt.num_rows
        work = llama_work(files.llama, num_tokens, **llama)
        yield Stage(name="LLaMA", parts=(("weights", llama_weights(files.llama, **llama)), ("work", work)))
        yield Stage(name="CLIP", parts=(("weights", whole_weights(files.clip, itemsize=itemsize)),))
        yield Stage(name="SigLIP", parts=(("weights", whole_weights(files.siglip, itemsize=itemsize)),))
        encoding = encode_bytes(self._vae_work(options), 1, request.height, request.width)
        yield Stage(name="VAE encoding", parts=(("weights", self._vae_weights), ("work", encoding)))

    def denoising(self, options: MemoryOptions) -> Iterator[Stage]:
        """Those that need the transformer."""
        config, tokens = self.transformers.config, self.tokens
        swap = self.swap.options(config, options.num_blocks, offload=options.offload)
        placed = self.transformers.placed(options.fp8, swap)
        work = Work(
            itemsize=self.types.transformer.itemsize,
            num_steps=self.request.num_steps,
            num_prepared=self._num_passes,
            unpacked=self.transformers.unpacked(options.fp8),
        )
        weights = (("weights", placed.stays), ("swap", placed.block_slots), ("LoRAs", self.lora_bytes))
        preparing = (("its own weights", placed.prepare_slots), ("work", prepare_bytes(config, tokens, work)))
        stepping = (("prepared", prepared_bytes(config, tokens, work)), ("work", step_bytes(config, tokens, work)))
        yield Stage(name="preparing", parts=(*weights, *preparing))
        yield Stage(name="denoising", parts=(*weights, *stepping))

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
        return whole_weights(self.files.vae, itemsize=self.types.encoders.itemsize)

    def _vae_work(self, options: MemoryOptions) -> VaeWork:
        sizes = {"tile_size": options.tile_size, "chunk_size": options.chunk_size}
        return VaeWork.of(self.files.vae, itemsize=self.types.encoders.itemsize, **sizes)

    # ---- what can be done ----

    def ladder(self) -> list[Rung[MemoryOptions]]:
        """The cheapest first. What the flags ask for already is not on it."""
        options, swap = self.options, self.swap
        rungs: list[Rung[MemoryOptions]] = []
        if not options.offload:
            is_automatic = swap.offload_invariant == "auto"
            flag = f"--offload_invariant {'auto' if is_automatic else 'always'}"
            rungs.append([Change(flag=flag, apply=lambda o: replace(o, offload=True), is_automatic=is_automatic)])
        if options.fp8 == "off" and self.transformers.accepts("scaled"):
            rungs.append([Change(flag="--fp8_scaled", apply=lambda o: replace(o, fp8="scaled"))])
        if not options.fp8_llm:
            rungs.append([Change(flag="--fp8_llm", apply=lambda o: replace(o, fp8_llm=True))])
        rungs.append(swap_rung(swap, self.transformers.config, options.num_blocks))
        if not options.chunk_size:
            flag = f"--vae_chunk_size {CHUNK}"
            rungs.append([Change(flag=flag, apply=lambda o: replace(o, chunk_size=CHUNK))])
        if not options.tile_size or options.tile_size > TILE:
            rungs.append([Change(flag="--vae_tiling", apply=lambda o: replace(o, tile_size=TILE))])
        return rungs

    # ---- words ----

    def _title(self) -> str:
        request, types = self.request, self.types
        count = request.num_sections
        kind = f"{count} section{'' if count == 1 else 's'}" if request.one_frame is None else "one frame"
        names = [str(dtype).removeprefix("torch.") for dtype in (types.transformer, types.encoders)]
        passes = ", two passes a step" if self._num_passes == 2 else ""
        where = f"transformer in {names[0]}, encoders and VAE in {names[1]}"
        return f"{kind} of {request.width}x{request.height}, {request.num_steps} steps{passes}; {where}"

    def _notes(self) -> list[str]:
        return ["not in it: the driver's share, work space of kernels, gaps between allocations"]


def swap_rung(swap: SwapWish, config: FramePackConfig, num_blocks: int) -> Rung:
    """More and more blocks in RAM, for options that have a `num_blocks`."""
    is_auto = swap.blocks.is_auto

    def change(number: int) -> Change:
        flag = "--blocks_to_swap auto" if is_auto else f"--blocks_to_swap {number}"
        return Change(flag=flag, apply=lambda o: replace(o, num_blocks=number), is_automatic=is_auto)

    most = most_blocks(config, for_training=swap.for_training)
    return [change(number) for number in range(num_blocks + 1, most + 1)]


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
    wish, num_swapped = compute.swap, compute.swap.blocks.value or 0
    return GenerationPlan(
        files=checkpoints,
        request=request,
        tokens=tokens,
        prompt=prompt,
        types=PlannedTypes(transformer=compute.transformer_dtype, encoders=compute.encoder_dtype),
        swap=wish,
        options=MemoryOptions(
            fp8=compute.fp8,
            fp8_llm=compute.fp8_llm,
            num_blocks=num_swapped,
            offload=wish.offload_invariant == "always" or (wish.offload_invariant == "auto" and num_swapped > 0),
            tile_size=compute.vae_tile_size,
            chunk_size=compute.vae_chunk_size,
        ),
        transformers=transformers,
        lora_bytes=sum(Path(lora.path).stat().st_size for lora in request.loras),
        bulk_decode=compute.bulk_decode,
    )


def _longest_prompt(request: FramePackRequest, tokenizer: PreTrainedTokenizerBase) -> PromptLength:
    prompts = [*request.prompts.values(), *([request.negative_prompt] if request.uses_cfg else [])]
    read = [prompt_tokens(tokenizer, prompt, system_prompt=request.system_prompt) for prompt in prompts]
    ids, num_prefix = max(read, key=lambda found: len(found[0]))
    return PromptLength(num_rows=len(ids) - num_prefix, num_prefix=num_prefix)
