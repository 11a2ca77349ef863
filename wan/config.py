"""The sizes of Wan2.1's transformer."""

from __future__ import annotations

from dataclasses import dataclass

from common.weights import Checkpoint
from options.errors import UserError
from options.wan_tasks import TransformerKind

Kind = TransformerKind
HEAD_DIM = 128
CONFIG_CLASSES = ("WanModel", "WanTransformer3DModel")
"""Whose `config.json` is the transformer's: the official one and diffusers'."""


@dataclass(frozen=True, kw_only=True)
class WanConfig:
    """Sizes of the model. `from_checkpoint` reads what tensor shapes tell."""

    num_blocks: int
    width: int
    mlp_width: int
    head_dim: int = HEAD_DIM
    in_channels: int = 16
    """Of the noisy latents, and of what is laid beside them: 20 more for images, 32 more for control videos."""
    latent_channels: int = 16
    """Of the noisy latents and of what comes out."""
    text_width: int = 4096
    text_length: int = 512
    """Rows that the blocks see of every text. Those past its end are zeros, which the model was trained with."""
    time_width: int = 256
    image_width: int | None = None
    """Of CLIP's features; None for a model that takes none."""
    num_image_positions: int | None = None
    """Rows of CLIP features of two pictures that the model tells apart; None for a model that does not."""

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint) -> WanConfig:
        """Dimensions from tensor shapes in the official layout; a head's size, which they do not tell, from
        `config.json` if any.

        Raises:
            UserError: a tensor that tells a dimension is missing or has another number of dimensions, or heads do not
                fit the width.
        """
        width, in_channels = checkpoint.shape("patch_embedding.weight", 5)[:2]
        head_dim = _head_dim(checkpoint, width)
        if head_dim < 1 or width % head_dim:
            got, expected = f"width {width} with heads of {head_dim} channels", "a width that heads divide evenly"
            remedy = "the file or its config.json is another model's"
            raise UserError(f"{checkpoint.flag} {checkpoint.path}", got, expected, remedy)
        names = checkpoint.tensors
        has_image, has_positions = "img_emb.proj.1.weight" in names, "img_emb.emb_pos" in names
        return cls(
            num_blocks=checkpoint.count("blocks.{}.self_attn.q.weight"),
            width=width,
            mlp_width=checkpoint.shape("blocks.0.ffn.0.weight", 2)[0],
            head_dim=head_dim,
            in_channels=in_channels,
            latent_channels=checkpoint.shape("head.head.weight", 2)[0] // 4,
            text_width=checkpoint.shape("text_embedding.0.weight", 2)[1],
            time_width=checkpoint.shape("time_embedding.0.weight", 2)[1],
            image_width=checkpoint.shape("img_emb.proj.1.weight", 2)[1] if has_image else None,
            num_image_positions=checkpoint.shape("img_emb.emb_pos", 3)[1] if has_positions else None,
        )

    @property
    def num_heads(self) -> int:
        return self.width // self.head_dim

    @property
    def rope_axes(self) -> tuple[int, int, int]:
        """A head's channels for frame, row and column: 44, 42 and 42 of 128."""
        across = 2 * (self.head_dim // 6)
        return self.head_dim - 2 * across, across, across

    @property
    def kind(self) -> Kind:
        """What the model was made for."""
        if self.image_width is None:
            return "t2v"
        if self.in_channels == 3 * self.latent_channels:
            return "fun_control"
        return "i2v" if self.num_image_positions is None else "flf2v"


def _head_dim(checkpoint: Checkpoint, width: int) -> int:
    config = checkpoint.config
    # Users keep all their files in one folder, with another model's config.json perhaps.
    if config.get("_class_name") not in CONFIG_CLASSES:
        return HEAD_DIM
    given, num_heads = config.get("attention_head_dim"), config.get("num_heads")
    if isinstance(given, int):
        return given
    return width // num_heads if isinstance(num_heads, int) and num_heads > 0 else HEAD_DIM
