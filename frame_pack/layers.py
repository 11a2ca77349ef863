"""The parts of FramePack's transformer. Attributes match the published checkpoints.

Shapes: B batch, S steps, C latent channels, L tokens, D width, N heads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frame_pack.config import FramePackConfig
from modules.attention import AttentionLayout, attend
from modules.layers import NORM_EPS, Shift, modulate, sinusoid
from modules.rope import Rope, apply_rope

TIME_CHANNELS = 256


class Mlp(nn.Module):
    """Linear, SiLU, Linear; used for time, guidance and pooled text."""

    def __init__(self, in_width: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_width, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


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
        waves = sinusoid(timesteps, TIME_CHANNELS).to(pooled.dtype)
        embedded = self.timestep_embedder(waves) + self.text_embedder(pooled)
        if guidance is not None:
            embedded = embedded + self.guidance_embedder(sinusoid(guidance, TIME_CHANNELS).to(pooled.dtype))
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
        self, image: Tensor, text: Tensor, image_mod: Tensor, text_mod: Tensor, rope: Rope, layout: AttentionLayout
    ) -> tuple[Tensor, Tensor]:
        """image (B, L_image, D), text (B, L_text, D), modulations (B, 1, 6·D) → both streams."""
        image_attn, image_mlp = _two_shifts(image_mod)
        text_attn, text_mlp = _two_shifts(text_mod)
        image_qkv = self.attn.image_qkv(modulate(image, image_attn.scale, image_attn.shift), rope)
        text_qkv = self.attn.text_qkv(modulate(text, text_attn.scale, text_attn.shift))
        joined = (torch.cat(pair, dim=1) for pair in zip(image_qkv, text_qkv, strict=True))
        attended_image, attended_text = attend(*joined, layout).split([image.shape[1], text.shape[1]], dim=1)

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

    def forward(self, x: Tensor, modulation: Tensor, rope: Rope, layout: AttentionLayout) -> Tensor:
        """x (B, L, D), modulation (B, 1, 3·D); `rope` leaves the text tokens unrotated."""
        shift = Shift(*modulation.chunk(3, dim=-1))
        normed = modulate(x, shift.scale, shift.shift)
        attended = attend(*self.attn.image_qkv(normed, rope), layout)
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
        # PyTorch's own whatever the blocks use: it is small, and padding is a matter of queries too.
        return self.to_out[0](attend(*heads, AttentionLayout(mask=mask)))


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


class ImageProjection(nn.Module):
    """SigLIP states to text-like tokens."""

    def __init__(self, in_width: int, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(in_width, 3 * width)
        self.down = nn.Linear(3 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.up(x)))
