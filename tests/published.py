"""Checkpoints with the published tensors, described but not there: headers only."""

import json
from dataclasses import replace
from pathlib import Path

from common.weights import Checkpoint, TensorInfo
from frame_pack.loading import FramePackCheckpoints
from wan import image_encoder, text_encoder
from wan import vae as wan_vae
from wan.checkpoints import WanCheckpoints

DATA = Path(__file__).parent / "data"
CLIP_WEIGHTS, SIGLIP_WEIGHTS = 123_060_480, 413_000_000
"""About as many as these two have; one tensor stands for all of them."""


def described(flag: str, shapes: dict[str, tuple[int, ...]], dtype: str) -> Checkpoint:
    file = Path("公開") / f"{flag}.safetensors"
    tensors = {n: TensorInfo(file=file, key=n, dtype=dtype, shape=tuple(s)) for n, s in shapes.items()}
    return Checkpoint(flag=flag, path=file, files=(file,), tensors=tensors, config={})


def published_shapes(name: str) -> dict[str, tuple[int, ...]]:
    return json.loads((DATA / f"{name}_shapes.json").read_text(encoding="utf-8"))


def published_wan(name: str) -> dict[str, list[int]]:
    """`t2v_1.3B`, `t2v_14B`, `i2v_14B`, `flf2v_14B`, `fun_control_1.3B` or `fun_control_14B`."""
    tables = published_shapes("wan_dit")
    table = _fun_control(tables, name.removeprefix("fun_control_")) if "fun" in name else tables[name]
    blocks = range(table["num_blocks"])
    return {f"blocks.{i}.{leaf}": shape for i in blocks for leaf, shape in table["block"].items()} | table["others"]


def _fun_control(tables: dict, size: str) -> dict:
    """The model for text of that size, with what the one for pictures has more, and the channels of a video."""
    text, image = tables[f"t2v_{size}"], tables["i2v_14B"]
    width, its_width = (table["others"]["head.modulation"][2] for table in (text, image))
    more = {
        part: {
            name: [width if number == its_width else number for number in shape]
            for name, shape in image[part].items()
            if name not in text[part]
        }
        for part in ("block", "others")
    }
    others = text["others"] | more["others"] | {"patch_embedding.weight": [width, 48, 1, 2, 2]}
    return {"num_blocks": text["num_blocks"], "block": text["block"] | more["block"], "others": others}


def published_transformer() -> Checkpoint:
    return described("--dit", published_shapes("framepack_dit"), "BF16")


def published_vae() -> Checkpoint:
    return described("--vae", published_shapes("hunyuan_vae"), "F16")


def published_llama() -> Checkpoint:
    """LLaMA-3 8B: 32 layers, width 4096, 8 heads of keys, inner width 14336, 128320 tokens."""
    shapes = {"embed_tokens.weight": (128320, 4096), "norm.weight": (4096,)}
    for i in range(32):
        shapes |= {f"layers.{i}.self_attn.{name}_proj.weight": (4096, 4096) for name in "qo"}
        shapes |= {f"layers.{i}.self_attn.{name}_proj.weight": (1024, 4096) for name in "kv"}
        shapes |= {f"layers.{i}.mlp.{name}_proj.weight": (14336, 4096) for name in ("gate", "up")}
        shapes |= {f"layers.{i}.mlp.down_proj.weight": (4096, 14336)}
        shapes |= {f"layers.{i}.{name}_layernorm.weight": (4096,) for name in ("input", "post_attention")}
    return described("--text_encoder1", shapes, "F16")


def published_models() -> FramePackCheckpoints:
    return FramePackCheckpoints(
        transformer=published_transformer(),
        vae=published_vae(),
        llama=published_llama(),
        clip=described("--text_encoder2", {"all": (CLIP_WEIGHTS,)}, "F16"),
        siglip=described(
            "--image_encoder", {"all": (SIGLIP_WEIGHTS,), "embeddings.position_embedding.weight": (729, 1152)}, "F16"
        ),
    )


def published_wan_models(name: str) -> WanCheckpoints:
    """With that transformer, see `published_wan`, as loading them knows their tensors."""
    t5 = {text_encoder._transformers_name(n): shape for n, shape in published_shapes("wan_umt5").items()}
    vae = {wan_vae._diffusers_name(n, block_length=4): shape for n, shape in published_shapes("wan_vae").items()}
    transformer = described("--dit", published_wan(name), "BF16")
    return WanCheckpoints(
        transformer=transformer,
        vae=described("--vae", vae, "F32"),
        t5=described("--t5", t5, "BF16"),
        clip=published_wan_clip() if "img_emb.proj.1.weight" in transformer.tensors else None,
    )


def published_wan_clip() -> Checkpoint:
    """The image encoder alone."""
    shapes = published_shapes("wan_clip")
    whole = described("--clip", {n.removeprefix("visual."): s for n, s in shapes.items() if "visual." in n}, "F16")
    tensors = (pair for name, info in whole.tensors.items() for pair in image_encoder._in_transformers(name, info))
    return replace(whole, tensors=dict(tensors))
