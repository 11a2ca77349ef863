"""What a checkpoint is, told from its tensor names alone, so that a wrong file is refused at the door."""

from collections.abc import Iterable
from dataclasses import dataclass

from common.weights import Checkpoint
from options.errors import UserError
from options.wan_tasks import WAN21_ONLY

FRAMEPACK_TRANSFORMER = "FramePack transformer"
HUNYUAN_VAE = "HunyuanVideo VAE"
LLAMA = "LLaMA text encoder"
CLIP_L = "CLIP-L text encoder"
SIGLIP = "SigLIP image encoder"
WAN_TRANSFORMER = "Wan transformer"
WAN_VAE = "Wan VAE"
WAN22_VAE = "Wan2.2 VAE"
UMT5 = "UMT5 text encoder"
WAN_CLIP = "CLIP image encoder"
LORA = "LoRA"


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of file and the tensor names that give it away; one with several layouts has an entry for each."""

    name: str
    has: tuple[str, ...]
    """Names (`prefix.`-tolerant) that are all there."""
    lacks: tuple[str, ...] = ()
    """Names of a close relative, none of which is there."""
    flag: str | None = None
    """Where a file of this kind belongs; None when no script of ours takes it."""
    remedy: str | None = None
    """What to tell a user who gives one, instead of where it belongs."""


KINDS = (
    Kind(
        name=FRAMEPACK_TRANSFORMER,
        has=("clean_x_embedder.proj.weight", "transformer_blocks.0.attn.to_q.weight"),
        flag="--dit",
    ),
    Kind(
        name="HunyuanVideo transformer (diffusers layout)",
        has=("context_embedder.proj_in.weight", "transformer_blocks.0.attn.to_q.weight"),
        lacks=("clean_x_embedder.proj.weight",),
    ),
    Kind(
        name="HunyuanVideo transformer",
        has=("txt_in.individual_token_refiner.blocks.0.norm1.weight",),
    ),
    Kind(name=WAN_TRANSFORMER, has=("blocks.0.cross_attn.k.weight", "time_projection.1.weight"), flag="--dit"),
    Kind(
        name=WAN_TRANSFORMER,  # diffusers' layout
        has=("blocks.0.attn2.to_k.weight", "condition_embedder.time_proj.weight"),
        flag="--dit",
    ),
    Kind(
        name=HUNYUAN_VAE,
        has=("encoder.down_blocks.0.resnets.0.conv1.conv.weight", "decoder.conv_in.conv.weight"),
        flag="--vae",
    ),
    Kind(
        name=WAN_VAE,
        has=("encoder.downsamples.0.residual.2.weight", "decoder.middle.0.residual.2.weight"),
        flag="--vae",
    ),
    Kind(
        name=WAN_VAE,  # diffusers' layout
        has=("encoder.down_blocks.0.conv1.weight", "decoder.up_blocks.0.resnets.0.conv1.weight"),
        flag="--vae",
    ),
    Kind(
        name=WAN22_VAE,
        has=("encoder.downsamples.0.downsamples.0.residual.2.weight",),
        remedy=WAN21_ONLY,
    ),
    Kind(
        name=WAN22_VAE,  # diffusers' layout
        has=("encoder.down_blocks.0.resnets.0.norm1.gamma", "decoder.conv_in.weight"),
        remedy=WAN21_ONLY,
    ),
    Kind(name="image VAE", has=("encoder.down.0.block.0.conv1.weight",)),
    Kind(
        name="image VAE (diffusers layout)",
        has=("encoder.down_blocks.0.resnets.0.conv1.weight", "decoder.conv_in.weight"),
    ),
    Kind(
        name=LLAMA,
        has=("layers.0.self_attn.q_proj.weight", "layers.0.mlp.gate_proj.weight"),
        flag="--text_encoder1",
    ),
    Kind(
        name=CLIP_L,
        has=("embeddings.token_embedding.weight", "encoder.layers.0.self_attn.q_proj.weight"),
        lacks=("embeddings.patch_embedding.weight",),
        flag="--text_encoder2",
    ),
    Kind(
        name="whole CLIP or SigLIP model",
        has=("embeddings.token_embedding.weight", "embeddings.patch_embedding.weight"),
    ),
    Kind(
        name=WAN_CLIP,  # transformers' layout
        has=("pre_layrnorm.weight", "embeddings.class_embedding"),
        flag="--clip",
    ),
    Kind(
        name=SIGLIP,
        has=("embeddings.patch_embedding.weight", "encoder.layers.0.self_attn.q_proj.weight"),
        lacks=("embeddings.token_embedding.weight", "pre_layrnorm.weight"),
        flag="--image_encoder",
    ),
    Kind(name=UMT5, has=("blocks.0.pos_embedding.embedding.weight", "blocks.0.ffn.gate.0.weight"), flag="--t5"),
    Kind(
        name=UMT5,  # transformers' layout; in an ordinary T5 only the first block has a bias
        has=(
            "block.0.layer.0.SelfAttention.relative_attention_bias.weight",
            "block.1.layer.0.SelfAttention.relative_attention_bias.weight",
        ),
        flag="--t5",
    ),
    Kind(name="T5 text encoder", has=("block.0.layer.0.SelfAttention.q.weight",)),
    Kind(name=WAN_CLIP, has=("transformer.0.attn.to_qkv.weight", "cls_embedding"), flag="--clip"),
)
LORA_MARKS = (".lora_down.", ".lora_up.", ".lora_A.", ".lora_B.", ".hada_w1_a", ".lokr_w1", ".lokr_w2")
CACHE_MARKS = ("latents_", "latent_indices_", "llama_vec_", "llama_attention_mask", "clip_l_pooler_", "varlen_t5_")


def kind_of(names: Iterable[str]) -> str | None:
    """The kind of the checkpoint with these tensor names, whatever prefix they carry; None when it is none we know."""
    names = list(names)
    if any(mark in name for name in names for mark in LORA_MARKS):
        return LORA
    if names == ["latent"]:
        return "saved latent"
    if any(name.startswith(CACHE_MARKS) for name in names):
        return "cache file"
    return next((kind.name for kind in KINDS if _fits(kind, names)), None)


def _fits(kind: Kind, names: list[str]) -> bool:
    return all(_holds(names, mark) for mark in kind.has) and not any(_holds(names, mark) for mark in kind.lacks)


def _holds(names: list[str], mark: str) -> bool:
    """Whether a name is `mark`, alone or after a prefix (`model.`, `model.diffusion_model.`, `vae.`, `text_model.`)."""
    return any(name == mark or name.endswith("." + mark) for name in names)


def expect_kind(checkpoint: Checkpoint, kind: str) -> None:
    """Refuses a checkpoint that is not of `kind` (one of this module's constants).

    Raises:
        UserError: it says what the file is, what was wanted, and where that file belongs.
    """
    found = kind_of(checkpoint.tensors)
    if found == kind:
        return
    first = next(iter(checkpoint.tensors), "none")
    what = _with_article(found) if found else f"{len(checkpoint.tensors)} tensors of no model known here, {first} first"
    raise UserError(checkpoint.flag, f"{checkpoint.path}, {what}", _with_article(kind), _remedy(found, checkpoint.flag))


def _remedy(found: str | None, flag: str) -> str:
    """What to do with a file of the kind `found` that was given behind `flag`."""
    entry = next((entry for entry in KINDS if entry.name == found), None)
    if entry and entry.remedy:
        return entry.remedy
    return f"that file belongs to {entry.flag}" if entry and entry.flag not in (None, flag) else "check the path"


def _with_article(kind: str) -> str:
    return f"{'an' if kind.startswith('image') else 'a'} {kind}"
