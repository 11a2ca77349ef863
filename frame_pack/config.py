"""The sizes of FramePack's transformer."""

from __future__ import annotations

from dataclasses import dataclass

from common.weights import Checkpoint
from options.errors import UserError

FAMILY = "framepack"
"""What results of this model family call themselves."""


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
    def num_blocks(self) -> int:
        """Of both kinds."""
        return self.num_double_blocks + self.num_single_blocks

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint) -> FramePackConfig:
        """Dimensions from tensor shapes; rotary axes and base, which shapes do not tell, from `config.json` if any.

        Raises:
            UserError: a tensor that tells a dimension is missing or has another number of dimensions, or the rotary
                axes do not fit the heads.
        """
        width, channels = checkpoint.shape("x_embedder.proj.weight", 5)[:2]
        head_dim = checkpoint.shape("transformer_blocks.0.attn.norm_q.weight", 1)[0]
        # Users keep all their files in one folder: another model's config.json must not set our rotary base.
        is_own = "pack" in str(checkpoint.config.get("_class_name", "")).lower()
        own = checkpoint.config if is_own else {}
        rope_axes = tuple(own.get("rope_axes_dim", cls.rope_axes))
        if sum(rope_axes) != head_dim:
            got, expected = f"rotary axes {rope_axes}", f"axes that add up to a head's {head_dim} channels"
            remedy = "the file or its config.json is another model's"
            raise UserError(f"{checkpoint.flag} {checkpoint.path}", got, expected, remedy)
        return cls(
            num_double_blocks=checkpoint.count("transformer_blocks.{}.attn.to_q.weight"),
            num_single_blocks=checkpoint.count("single_transformer_blocks.{}.attn.to_q.weight"),
            num_refiner_blocks=checkpoint.count("context_embedder.token_refiner.refiner_blocks.{}.attn.to_q.weight"),
            width=width,
            mlp_width=checkpoint.shape("transformer_blocks.0.ff.net.0.proj.weight", 2)[0],
            head_dim=head_dim,
            latent_channels=channels,
            text_width=checkpoint.shape("context_embedder.proj_in.weight", 2)[1],
            pooled_width=checkpoint.shape("time_text_embed.text_embedder.linear_1.weight", 2)[1],
            image_width=checkpoint.shape("image_projection.up.weight", 2)[1],
            rope_axes=rope_axes,
            rope_theta=float(own.get("rope_theta", cls.rope_theta)),
        )
