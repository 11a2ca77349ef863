"""FramePack's transformer (HunyuanVideo blocks with packed, progressively coarser history).

Module attributes match the published checkpoints. The forward has two faces: `prepare` computes everything that does
not depend on the noisy latents, for all steps at once; `step` does the rest. `forward` is the two in a row.

Shapes: B batch, S steps, C latent channels, T target frames, H W latent size, L tokens, D width, N heads.
Token order: [4x history, 2x history, clean (1x) frames, target | image embedding, text].

Sources: Zhang & Agrawala, "Packing Input Frame Context in Next-Frame Prediction Models for Video Generation" (2025);
HunyuanVideo (2024); diffusers' `HunyuanVideoFramepackTransformer3DModel`, with which this model agrees numerically.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from frame_pack.context import PackedContext
from frame_pack.rope import Rope, RopeScaling, apply_rope, concatenate, group_rope, unrotated
from modules.attention import attend, key_mask

TIME_CHANNELS = 256
PATCH = 2  # rows and columns of a target token, in latent pixels
NORM_EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class FramePackConfig:
    """Sizes of the model. Defaults are the published ones; `from_checkpoint` reads what tensor shapes tell."""

    num_double_blocks: int = 20
    num_single_blocks: int = 40
    num_refiner_blocks: int = 2
    width: int = 3072
    mlp_width: int = 12288
    head_dim: int = 128
    latent_channels: int = 16
    text_width: int = 4096
    pooled_width: int = 768
    image_width: int = 1152
    rope_axes: tuple[int, int, int] = (16, 56, 56)
    rope_theta: float = 256.0

    @property
    def num_heads(self) -> int:
        return self.width // self.head_dim

    @classmethod
    def from_checkpoint(cls, shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, object]) -> FramePackConfig:
        """Dimensions from tensor shapes; rotary axes and base, which shapes do not tell, from `config.json` if any."""
        width, channels = shapes["x_embedder.proj.weight"][:2]
        return cls(
            num_double_blocks=_count(shapes, "transformer_blocks."),
            num_single_blocks=_count(shapes, "single_transformer_blocks."),
            num_refiner_blocks=_count(shapes, "context_embedder.token_refiner.refiner_blocks."),
            width=width,
            mlp_width=shapes["transformer_blocks.0.ff.net.0.proj.weight"][0],
            head_dim=shapes["transformer_blocks.0.attn.norm_q.weight"][0],
            latent_channels=channels,
            text_width=shapes["context_embedder.proj_in.weight"][1],
            pooled_width=shapes["time_text_embed.text_embedder.linear_1.weight"][1],
            image_width=shapes["image_projection.up.weight"][1],
            rope_axes=tuple(config.get("rope_axes_dim", cls.rope_axes)),
            rope_theta=float(config.get("rope_theta", cls.rope_theta)),
        )


def _count(shapes: Iterable[str], prefix: str) -> int:
    """How many numbered blocks stand under `prefix`."""
    return len({name.removeprefix(prefix).split(".")[0] for name in shapes if name.startswith(prefix)})


@dataclass(frozen=True, kw_only=True)
class Conditioning:
    """What the transformer is told besides the noisy latents and the timestep."""

    context: PackedContext
    text: Tensor
    """(B, L, text_width) LLaMA states; rows past a sample's length are ignored."""
    text_mask: Tensor
    """(B, L) bool, True for valid rows, which come first."""
    pooled: Tensor
    """(B, pooled_width) CLIP-L pooler output."""
    image: Tensor
    """(B, 729, image_width) SigLIP states."""
    guidance: Tensor
    """(B,) distilled guidance scale times 1000."""


class Shift(NamedTuple):
    """How a timestep modulates one sub-layer: x·(1 + scale) + shift going in, times gate coming out. (B, 1, D) each."""

    shift: Tensor
    scale: Tensor
    gate: Tensor


class StepInputs(NamedTuple):
    """What one step's blocks receive, already selected for that step."""

    text: Tensor
    rope: Rope
    double_image: tuple[Tensor, ...]
    double_text: tuple[Tensor, ...]
    single: tuple[Tensor, ...]
    final: Tensor


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Everything of a denoising loop that does not depend on the noisy latents."""

    clean_tokens: Tensor
    """(B, L_clean, D) embedded history and control frames."""
    mask: Tensor | None
    """(B, 1, 1, L) for samples of unequal text length."""
    steps: tuple[StepInputs, ...]


class Mlp(nn.Module):
    """Linear, SiLU, Linear; used for time, guidance and pooled text."""

    def __init__(self, in_width: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_width, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


def sinusoid(positions: Tensor) -> Tensor:
    """(...,) → (..., 256): cosines, then sines, of geometric frequencies down to 1 / 10000. In float32."""
    half = TIME_CHANNELS // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, device=positions.device, dtype=torch.float32) / half)
    angles = positions.float()[..., None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimeTextEmbedding(nn.Module):
    """Embeds timestep, pooled text and, for the main stream, distilled guidance into one vector."""

    def __init__(self, text_width: int, width: int, *, guidance: bool) -> None:
        super().__init__()
        self.timestep_embedder = Mlp(TIME_CHANNELS, width)
        if guidance:
            self.guidance_embedder = Mlp(TIME_CHANNELS, width)
        self.text_embedder = Mlp(text_width, width)

    def forward(self, timesteps: Tensor, pooled: Tensor, guidance: Tensor | None = None) -> Tensor:
        """timesteps (S, B), pooled (B, text_width), guidance (B,) → (S, B, D)."""
        embedded = self.timestep_embedder(sinusoid(timesteps).to(pooled.dtype)) + self.text_embedder(pooled)
        if guidance is not None:
            embedded = embedded + self.guidance_embedder(sinusoid(guidance).to(pooled.dtype))
        return embedded


class FeedForward(nn.Module):
    """Linear, activation, Linear under the published names `net.0.proj` and `net.2`."""

    def __init__(self, width: int, hidden: int, activation: nn.Module) -> None:
        super().__init__()
        first = nn.Module()
        first.proj = nn.Linear(width, hidden)
        self.net = nn.ModuleList([first, activation, nn.Linear(hidden, width)])

    def forward(self, x: Tensor) -> Tensor:
        first, activation, last = self.net
        return last(activation(first.proj(x)))


class Modulation(nn.Module):
    """The linear layer that turns a timestep embedding into `num` modulation vectors."""

    def __init__(self, width: int, num: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, num * width)

    def forward(self, embedding: Tensor) -> Tensor:
        """(S, B, D) → (S, B, 1, num·D): all steps in one product, broadcast over tokens later."""
        return self.linear(F.silu(embedding))[:, :, None]


def modulate(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=NORM_EPS) * (1 + scale) + shift


class Attention(nn.Module):
    """Projections of one or two token streams; `joint=True` adds the text stream's own."""

    def __init__(self, config: FramePackConfig, *, joint: bool) -> None:
        super().__init__()
        width, self.head_dim = config.width, config.head_dim
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.norm_q, self.norm_k = (nn.RMSNorm(self.head_dim, eps=NORM_EPS) for _ in range(2))
        if joint:
            self.add_q_proj, self.add_k_proj, self.add_v_proj = (nn.Linear(width, width) for _ in range(3))
            self.norm_added_q, self.norm_added_k = (nn.RMSNorm(self.head_dim, eps=NORM_EPS) for _ in range(2))
            self.to_out = nn.ModuleList([nn.Linear(width, width)])
            self.to_add_out = nn.Linear(width, width)

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))

    def image_qkv(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        query, key = self.norm_q(self.heads(self.to_q(x))), self.norm_k(self.heads(self.to_k(x)))
        return apply_rope(query, rope), apply_rope(key, rope), self.heads(self.to_v(x))

    def text_qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query = self.norm_added_q(self.heads(self.add_q_proj(x)))
        key = self.norm_added_k(self.heads(self.add_k_proj(x)))
        return query, key, self.heads(self.add_v_proj(x))


class DoubleBlock(nn.Module):
    """Image and text keep their own weights and meet in one attention."""

    def __init__(self, config: FramePackConfig) -> None:
        super().__init__()
        self.norm1 = Modulation(config.width, 6)
        self.norm1_context = Modulation(config.width, 6)
        self.attn = Attention(config, joint=True)
        self.ff = FeedForward(config.width, config.mlp_width, nn.GELU(approximate="tanh"))
        self.ff_context = FeedForward(config.width, config.mlp_width, nn.GELU(approximate="tanh"))

    def forward(
        self, image: Tensor, text: Tensor, image_mod: Tensor, text_mod: Tensor, rope: Rope, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """image (B, L_image, D), text (B, L_text, D), modulations (B, 1, 6·D) → both streams."""
        image_attn, image_mlp = _two_shifts(image_mod)
        text_attn, text_mlp = _two_shifts(text_mod)
        image_qkv = self.attn.image_qkv(modulate(image, image_attn.scale, image_attn.shift), rope)
        text_qkv = self.attn.text_qkv(modulate(text, text_attn.scale, text_attn.shift))
        joined = (torch.cat(pair, dim=1) for pair in zip(image_qkv, text_qkv, strict=True))
        attended_image, attended_text = attend(*joined, mask).split([image.shape[1], text.shape[1]], dim=1)

        image = image + image_attn.gate * self.attn.to_out[0](attended_image)
        text = text + text_attn.gate * self.attn.to_add_out(attended_text)
        image = image + image_mlp.gate * self.ff(modulate(image, image_mlp.scale, image_mlp.shift))
        text = text + text_mlp.gate * self.ff_context(modulate(text, text_mlp.scale, text_mlp.shift))
        return image, text


def _two_shifts(modulation: Tensor) -> tuple[Shift, Shift]:
    """For attention and for the MLP."""
    parts = modulation.chunk(6, dim=-1)
    return Shift(*parts[:3]), Shift(*parts[3:])


class SingleBlock(nn.Module):
    """Image and text as one sequence; attention and MLP side by side."""

    def __init__(self, config: FramePackConfig) -> None:
        super().__init__()
        self.norm = Modulation(config.width, 3)
        self.attn = Attention(config, joint=False)
        self.proj_mlp = nn.Linear(config.width, config.mlp_width)
        self.proj_out = nn.Linear(config.width + config.mlp_width, config.width)

    def forward(self, x: Tensor, modulation: Tensor, rope: Rope, mask: Tensor | None) -> Tensor:
        """x (B, L, D), modulation (B, 1, 3·D); `rope` leaves the text tokens unrotated."""
        shift = Shift(*modulation.chunk(3, dim=-1))
        normed = modulate(x, shift.scale, shift.shift)
        attended = attend(*self.attn.image_qkv(normed, rope), mask)
        mlp = F.gelu(self.proj_mlp(normed), approximate="tanh")
        return x + shift.gate * self.proj_out(torch.cat([attended, mlp], dim=-1))


class RefinerAttention(nn.Module):
    """Plain self-attention over text tokens."""

    def __init__(self, config: FramePackConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.to_q, self.to_k, self.to_v = (nn.Linear(config.width, config.width) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(config.width, config.width)])

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        heads = (linear(x).unflatten(-1, (-1, self.head_dim)) for linear in (self.to_q, self.to_k, self.to_v))
        return self.to_out[0](attend(*heads, mask))


class RefinerBlock(nn.Module):
    """Text self-attention and MLP; only the two gates know the timestep."""

    def __init__(self, config: FramePackConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=NORM_EPS)
        self.attn = RefinerAttention(config)
        self.norm2 = nn.LayerNorm(config.width, eps=NORM_EPS)
        self.ff = FeedForward(config.width, 4 * config.width, nn.SiLU())
        self.norm_out = Modulation(config.width, 2)

    def forward(self, x: Tensor, embedding: Tensor, mask: Tensor | None) -> Tensor:
        """x (S or 1, B, L, D), embedding (S, B, D) → (S, B, L, D).

        The first block's x is the same for all steps (size 1), so its attention is computed once.
        """
        gate_attn, gate_mlp = self.norm_out(embedding).chunk(2, dim=-1)
        steps, batch = x.shape[:2]
        repeated = mask if mask is None else mask.repeat(steps, 1, 1, 1)
        attended = self.attn(self.norm1(x).flatten(0, 1), repeated).unflatten(0, (steps, batch))
        x = x + attended * gate_attn
        return x + self.ff(self.norm2(x)) * gate_mlp


class TextRefiner(nn.Module):
    """Projects LLaMA states to the model's width and refines them with the timestep in view."""

    def __init__(self, config: FramePackConfig) -> None:
        super().__init__()
        self.time_text_embed = TimeTextEmbedding(config.text_width, config.width, guidance=False)
        self.proj_in = nn.Linear(config.text_width, config.width)
        self.token_refiner = nn.Module()
        self.token_refiner.refiner_blocks = nn.ModuleList(
            RefinerBlock(config) for _ in range(config.num_refiner_blocks)
        )

    def forward(self, text: Tensor, lengths: Tensor, timesteps: Tensor) -> Tensor:
        """text (B, L, text_width) with `lengths` (B,) valid rows each, timesteps (S, B) → (S, B, L, D)."""
        valid = torch.arange(text.shape[1], device=text.device) < lengths[:, None]
        mean = (text * valid[..., None].float()).sum(dim=1) / lengths[:, None].float()
        embedding = self.time_text_embed(timesteps, mean.to(text.dtype))
        mask = None
        if not bool(valid.all()):
            mask = (valid[:, None, :] & valid[:, :, None])[:, None]
            mask[..., 0] = True  # rows of padding must see something, or softmax gives NaN
        x = self.proj_in(text)[None]
        for block in self.token_refiner.refiner_blocks:
            x = block(x, embedding, mask)
        return x


class CleanEmbedding(nn.Module):
    """Embeds clean frames at three resolutions; one coarse token covers a cube of fine ones."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv3d(channels, width, kernel_size=(1, 2, 2), stride=(1, 2, 2))
        self.proj_2x = nn.Conv3d(channels, width, kernel_size=(2, 4, 4), stride=(2, 4, 4))
        self.proj_4x = nn.Conv3d(channels, width, kernel_size=(4, 8, 8), stride=(4, 8, 8))


def embed_patches(latents: Tensor, conv: nn.Conv3d) -> Tensor:
    """(B, C, T, H, W) → (B, L, D), the end of each axis repeated up to a multiple of the kernel."""
    time, height, width = (-size % kernel for size, kernel in zip(latents.shape[2:], conv.kernel_size, strict=True))
    if time or height or width:
        latents = F.pad(latents, (0, width, 0, height, 0, time), mode="replicate")
    return rearrange(conv(latents), "b d t h w -> b (t h w) d")


class ImageProjection(nn.Module):
    """SigLIP states to text-like tokens."""

    def __init__(self, in_width: int, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(in_width, 3 * width)
        self.down = nn.Linear(3 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.up(x)))


class FramePackTransformer(nn.Module):
    """Predicts the flow velocity of target frames among clean frames. See the module's docstring."""

    def __init__(self, config: FramePackConfig) -> None:
        super().__init__()
        self.config = config
        self.x_embedder = nn.Module()
        self.x_embedder.proj = nn.Conv3d(
            config.latent_channels, config.width, kernel_size=(1, PATCH, PATCH), stride=(1, PATCH, PATCH)
        )
        self.clean_x_embedder = CleanEmbedding(config.latent_channels, config.width)
        self.context_embedder = TextRefiner(config)
        self.image_projection = ImageProjection(config.image_width, config.width)
        self.time_text_embed = TimeTextEmbedding(config.pooled_width, config.width, guidance=True)
        self.transformer_blocks = nn.ModuleList(DoubleBlock(config) for _ in range(config.num_double_blocks))
        self.single_transformer_blocks = nn.ModuleList(SingleBlock(config) for _ in range(config.num_single_blocks))
        self.norm_out = Modulation(config.width, 2)
        self.proj_out = nn.Linear(config.width, PATCH * PATCH * config.latent_channels)

    @property
    def dtype(self) -> torch.dtype:
        return self.x_embedder.proj.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.x_embedder.proj.weight.device

    def forward(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """latents (B, C, T, H, W), timesteps (B,) on the 0..1000 scale → velocity (B, C, T, H, W), float32."""
        return self.step(latents, self.prepare(conditioning, timesteps[None]), 0)

    def prepare(
        self, conditioning: Conditioning, timesteps: Tensor, *, rope_scaling: RopeScaling | None = None
    ) -> Prepared:
        """Computes all that the noisy latents do not change, for `timesteps` (S, B), S = 1 in training."""
        context = conditioning.context.to(self.device, self.dtype)
        text, image, pooled = (
            x.to(self.device, self.dtype) for x in (conditioning.text, conditioning.image, conditioning.pooled)
        )
        timesteps, guidance = timesteps.to(self.device), conditioning.guidance.to(self.device)
        lengths = conditioning.text_mask.to(self.device).sum(dim=1)
        text = text[:, : int(lengths.max())]

        clean_tokens = self._embed_clean(context)
        refined = self.context_embedder(text, lengths, timesteps)
        image_tokens = self.image_projection(image).expand(len(timesteps), -1, -1, -1)
        text_tokens = torch.cat([image_tokens, refined], dim=2)

        image_length = clean_tokens.shape[1] + context.num_target_tokens
        num_text = text_tokens.shape[2]
        ropes = self._ropes(context, timesteps, num_text, rope_scaling)
        embedding = self.time_text_embed(timesteps, pooled, guidance)
        return Prepared(
            clean_tokens=clean_tokens,
            mask=key_mask(lengths + image_length + image.shape[1], image_length + num_text),
            steps=tuple(
                StepInputs(*step) for step in zip(text_tokens, ropes, *self._modulations(embedding), strict=True)
            ),
        )

    def step(self, latents: Tensor, prepared: Prepared, index: int) -> Tensor:
        """latents (B, C, T, H, W) at step `index` → velocity of the same shape, float32."""
        inputs, mask = prepared.steps[index], prepared.mask
        target = embed_patches(latents.to(self.device, self.dtype), self.x_embedder.proj)
        image, text = torch.cat([prepared.clean_tokens, target], dim=1), inputs.text
        image_length, image_rope = image.shape[1], inputs.rope.first(image.shape[1])

        doubles = zip(self._visit(self.transformer_blocks), inputs.double_image, inputs.double_text, strict=True)
        for block, image_mod, text_mod in doubles:
            image, text = block(image, text, image_mod, text_mod, image_rope, mask)
        joined = torch.cat([image, text], dim=1)
        for block, modulation in zip(self._visit(self.single_transformer_blocks), inputs.single, strict=True):
            joined = block(joined, modulation, inputs.rope, mask)

        scale, shift = inputs.final.chunk(2, dim=-1)
        tokens = modulate(joined[:, image_length - target.shape[1] : image_length], scale, shift)
        # The published model projects its result in float32, also when everything before is bfloat16.
        patches = F.linear(tokens.float(), self.proj_out.weight.float(), self.proj_out.bias.float())
        _, channels, frames, height, width = latents.shape
        grid = {"t": frames, "h": height // PATCH, "w": width // PATCH, "c": channels, "p": PATCH, "q": PATCH}
        return rearrange(patches, "b (t h w) (c p q) -> b c t (h p) (w q)", **grid)

    def _visit(self, blocks: nn.ModuleList) -> Iterator[nn.Module]:
        """The one place where a block becomes the current one."""
        yield from blocks

    def _embed_clean(self, context: PackedContext) -> Tensor:
        """(B, L_clean, D): coarse to fine, absent groups left out."""
        embedder = self.clean_x_embedder
        convs = (embedder.proj_4x, embedder.proj_2x, embedder.proj)
        groups = (context.clean_4x, context.clean_2x, context.clean)
        tokens = [embed_patches(g.latents, conv) for g, conv in zip(groups, convs, strict=True) if g is not None]
        return torch.cat(tokens, dim=1)

    def _ropes(
        self, context: PackedContext, timesteps: Tensor, num_text: int, scaling: RopeScaling | None
    ) -> list[Rope]:
        """One table per step; steps of equal scale share theirs."""
        scales = [scaling.at(t) if scaling else 1.0 for t in timesteps[:, 0].tolist()]
        tables = {scale: self._rope(context, num_text, scale) for scale in set(scales)}
        return [tables[scale] for scale in scales]

    def _rope(self, context: PackedContext, num_text: int, scale: float) -> Rope:
        """Angles for the whole sequence, in token order."""
        frames_and_pools = [(g.indices, pool) for g, pool in context.coarse_to_fine()] + [(context.indices, 1)]
        config, (height, width) = self.config, context.token_grid
        ropes = [
            group_rope(frames, height, width, axes=config.rope_axes, theta=config.rope_theta, scale=scale, pool=pool)
            for frames, pool in frames_and_pools
        ]
        text = unrotated(len(context.indices), num_text, config.head_dim // 2, context.indices.device)
        return concatenate([*ropes, text])

    def _modulations(self, embedding: Tensor) -> tuple[list, ...]:
        """What every block makes of `embedding` (S, B, D): per step one tuple over the blocks."""
        doubles, singles = self.transformer_blocks, self.single_transformer_blocks
        return (
            list(zip(*(block.norm1(embedding) for block in doubles), strict=True)),
            list(zip(*(block.norm1_context(embedding) for block in doubles), strict=True)),
            list(zip(*(block.norm(embedding) for block in singles), strict=True)),
            list(self.norm_out(embedding)),
        )
