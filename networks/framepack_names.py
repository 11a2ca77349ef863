"""FramePack's module names, and HunyuanVideo's names for the modules that FramePack inherits.

HunyuanVideo in diffusers' layout names its modules as FramePack does. In its original layout query, key and value (and
in the single blocks the MLP's first matrix too) are one matrix; ComfyUI spells some of its names differently.
Source: the published checkpoints; diffusers' `_convert_hunyuan_video_lora_to_diffusers` and conversion script.
"""

from networks.module_names import NameTable, expand

DOUBLE, SINGLE = "transformer_blocks.{}", "single_transformer_blocks.{}"
REFINER = "context_embedder.token_refiner.refiner_blocks.{}"
TEXT_TIME = "context_embedder.time_text_embed"
TWO_LAYERS = ("linear_1", "linear_2")
QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
QKV_OF_TEXT = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
MLP = ("ff.net.0.proj", "ff.net.2")
MLP_OF_TEXT = ("ff_context.net.0.proj", "ff_context.net.2")

MODULES = (
    *expand(DOUBLE, "norm1.linear", *QKV, "attn.to_out.0", *MLP),
    *expand(DOUBLE, "norm1_context.linear", *QKV_OF_TEXT, "attn.to_add_out", *MLP_OF_TEXT),
    *expand(SINGLE, "norm.linear", *QKV, "proj_mlp", "proj_out"),
    *expand(REFINER, *QKV, "attn.to_out.0", *MLP, "norm_out.linear"),
    *expand(f"{TEXT_TIME}.timestep_embedder", *TWO_LAYERS),
    *expand(f"{TEXT_TIME}.text_embedder", *TWO_LAYERS),
    *expand("time_text_embed.timestep_embedder", *TWO_LAYERS),
    *expand("time_text_embed.guidance_embedder", *TWO_LAYERS),
    *expand("time_text_embed.text_embedder", *TWO_LAYERS),
    *expand("clean_x_embedder", "proj", "proj_2x", "proj_4x"),
    *expand("image_projection", "up", "down"),
    *("x_embedder.proj", "context_embedder.proj_in", "norm_out.linear", "proj_out"),
)


def _block_stream(stream: str, norm: str, qkv: tuple[str, ...], out: str, mlp: tuple[str, ...]) -> dict:
    """The image's or the text's half of a double block."""
    block = f"double_blocks.{{}}.{stream}"
    return {
        f"{block}_mod.linear": tuple(expand(DOUBLE, norm)),
        f"{block}_mod.lin": tuple(expand(DOUBLE, norm)),
        f"{block}_attn.qkv": tuple(expand(DOUBLE, *qkv)),
        f"{block}_attn.proj": tuple(expand(DOUBLE, out)),
        **_two_layers(f"{block}_mlp", ("fc1", "0"), ("fc2", "2"), of=DOUBLE, layers=mlp),
    }


def _two_layers(place: str, *spellings: tuple[str, ...], of: str, layers: tuple[str, ...] = TWO_LAYERS) -> dict:
    """Two layers after one another, each with several spellings."""
    pairs = zip(spellings, layers, strict=True)
    return {f"{place}.{name}": (f"{of}.{layer}",) for names, layer in pairs for name in names}


EMBEDDER = (("mlp.0", "in_layer", "linear_1"), ("mlp.2", "out_layer", "linear_2"))
HUNYUAN_REFINER = "txt_in.individual_token_refiner.blocks.{}"
HUNYUAN = {
    **_block_stream("img", "norm1.linear", QKV, "attn.to_out.0", MLP),
    **_block_stream("txt", "norm1_context.linear", QKV_OF_TEXT, "attn.to_add_out", MLP_OF_TEXT),
    "single_blocks.{}.linear1": tuple(expand(SINGLE, *QKV, "proj_mlp")),
    "single_blocks.{}.linear2": (f"{SINGLE}.proj_out",),
    "single_blocks.{}.modulation.linear": (f"{SINGLE}.norm.linear",),
    "single_blocks.{}.modulation.lin": (f"{SINGLE}.norm.linear",),
    f"{HUNYUAN_REFINER}.self_attn.qkv": tuple(expand(REFINER, *QKV)),
    f"{HUNYUAN_REFINER}.self_attn.proj": (f"{REFINER}.attn.to_out.0",),
    f"{HUNYUAN_REFINER}.adaLN_modulation.1": (f"{REFINER}.norm_out.linear",),
    **_two_layers(f"{HUNYUAN_REFINER}.mlp", ("fc1", "0"), ("fc2", "2"), of=REFINER, layers=MLP),
    **_two_layers("txt_in.t_embedder", *EMBEDDER, of=f"{TEXT_TIME}.timestep_embedder"),
    **_two_layers("txt_in.c_embedder", *EMBEDDER, of=f"{TEXT_TIME}.text_embedder"),
    **_two_layers("time_in", *EMBEDDER, of="time_text_embed.timestep_embedder"),
    **_two_layers("guidance_in", *EMBEDDER, of="time_text_embed.guidance_embedder"),
    **_two_layers("vector_in", *EMBEDDER, of="time_text_embed.text_embedder"),
    "txt_in.input_embedder": ("context_embedder.proj_in",),
    "img_in.proj": ("x_embedder.proj",),
    "final_layer.linear": ("proj_out",),
}
"""Without `final_layer.adaLN_modulation.1`: its shift and scale stand the other way round than in `norm_out.linear`."""

HUNYUAN_OTHERS = {
    "double_blocks.{}.img_attn_q_norm": f"{DOUBLE}.attn.norm_q",
    "double_blocks.{}.img_attn_k_norm": f"{DOUBLE}.attn.norm_k",
    "double_blocks.{}.txt_attn_q_norm": f"{DOUBLE}.attn.norm_added_q",
    "double_blocks.{}.txt_attn_k_norm": f"{DOUBLE}.attn.norm_added_k",
    "single_blocks.{}.q_norm": f"{SINGLE}.attn.norm_q",
    "single_blocks.{}.k_norm": f"{SINGLE}.attn.norm_k",
    f"{HUNYUAN_REFINER}.norm1": f"{REFINER}.norm1",
    f"{HUNYUAN_REFINER}.norm2": f"{REFINER}.norm2",
}
"""Norms."""

FRAMEPACK_NAMES = NameTable(
    architecture="FramePack",
    takes=("FramePack", "HunyuanVideo"),
    modules=MODULES,
    aliases=HUNYUAN,
    aliases_of="HunyuanVideo's",
    others=HUNYUAN_OTHERS,
)
