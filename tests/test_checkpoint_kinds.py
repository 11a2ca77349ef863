"""Kinds are told from the names in the libraries' own models and in the official files."""

from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch

from common.checkpoint_kinds import KINDS, expect_kind, kind_of
from common.weights import Checkpoint, TensorInfo
from options.errors import UserError


def framepack(**options) -> torch.nn.Module:
    from diffusers import HunyuanVideoFramepackTransformer3DModel as Framepack

    image = {"has_image_proj": True, "image_proj_dim": 8, "has_clean_x_embedder": True}
    return Framepack(num_layers=1, num_single_layers=1, num_refiner_layers=1, **image)


def hunyuan() -> torch.nn.Module:
    from diffusers import HunyuanVideoTransformer3DModel

    return HunyuanVideoTransformer3DModel(num_layers=1, num_single_layers=1, num_refiner_layers=1)


def wan() -> torch.nn.Module:
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(num_layers=1)


def hunyuan_vae() -> torch.nn.Module:
    from diffusers import AutoencoderKLHunyuanVideo

    return AutoencoderKLHunyuanVideo()


def wan_vae() -> torch.nn.Module:
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan()


def wan22_vae() -> torch.nn.Module:
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan(z_dim=48, is_residual=True, in_channels=12, out_channels=12, patch_size=2)


def image_vae() -> torch.nn.Module:
    from diffusers import AutoencoderKL

    return AutoencoderKL(block_out_channels=(32,), norm_num_groups=32)


def llama() -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=1))


def clip_text() -> torch.nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(CLIPTextConfig(num_hidden_layers=1))


def clip_vision() -> torch.nn.Module:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    return CLIPVisionModel(CLIPVisionConfig(num_hidden_layers=1))


def clip() -> torch.nn.Module:
    from transformers import CLIPConfig, CLIPModel

    return CLIPModel(CLIPConfig())


def siglip() -> torch.nn.Module:
    from transformers import SiglipVisionConfig, SiglipVisionModel

    return SiglipVisionModel(SiglipVisionConfig(num_hidden_layers=1))


def whole_siglip() -> torch.nn.Module:
    from transformers import SiglipConfig, SiglipModel

    return SiglipModel(SiglipConfig())


def umt5() -> torch.nn.Module:
    from transformers import UMT5Config, UMT5EncoderModel

    return UMT5EncoderModel(UMT5Config(num_layers=2))


def t5() -> torch.nn.Module:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(num_layers=2))


@pytest.mark.parametrize(
    ("build", "kind"),
    [
        (framepack, "FramePack transformer"),
        (hunyuan, "HunyuanVideo transformer (diffusers layout)"),
        (wan, "Wan transformer"),
        (hunyuan_vae, "HunyuanVideo VAE"),
        (wan_vae, "Wan VAE"),
        (wan22_vae, "Wan2.2 VAE"),
        (image_vae, "image VAE (diffusers layout)"),
        (llama, "LLaMA text encoder"),
        (clip_text, "CLIP-L text encoder"),
        (clip_vision, "CLIP image encoder"),
        (clip, "whole CLIP or SigLIP model"),
        (siglip, "SigLIP image encoder"),
        (whole_siglip, "whole CLIP or SigLIP model"),
        (umt5, "UMT5 text encoder"),
        (t5, "T5 text encoder"),
    ],
)
def test_the_libraries_models(build: Callable[[], torch.nn.Module], kind: str) -> None:
    with torch.device("meta"):
        names = list(build().state_dict())
    for prefix in ("", "model.", "model.diffusion_model.", "vae.", "text_model.", "vision_model."):
        assert kind_of(prefix + name for name in names) == kind, prefix


OFFICIAL = {
    "Wan transformer": ["patch_embedding.weight", "time_projection.1.weight", "blocks.0.cross_attn.k.weight"],
    "Wan VAE": ["conv1.weight", "encoder.downsamples.0.residual.2.weight", "decoder.middle.0.residual.2.weight"],
    "UMT5 text encoder": ["blocks.0.pos_embedding.embedding.weight", "blocks.0.ffn.gate.0.weight", "norm.weight"],
    "CLIP image encoder": ["visual.cls_embedding", "visual.transformer.0.attn.to_qkv.weight", "textual.norm.weight"],
    "Wan2.2 VAE": ["encoder.conv1.weight", "encoder.downsamples.0.downsamples.0.residual.2.weight"],
    "HunyuanVideo transformer": ["img_in.proj.weight", "txt_in.individual_token_refiner.blocks.0.norm1.weight"],
    "image VAE": ["encoder.down.0.block.0.conv1.weight", "decoder.conv_in.weight"],
    "LoRA": ["lora_unet_transformer_blocks_0_attn_to_q.lora_down.weight", "lora_unet_x.alpha"],
    "saved latent": ["latent"],
    "cache file": ["latents_1x80x80_float32", "clean_latent_indices_int32"],
}


@pytest.mark.parametrize("kind", OFFICIAL)
def test_the_official_layouts(kind: str) -> None:
    assert kind_of(OFFICIAL[kind]) == kind
    assert kind_of(["encoder." + name for name in OFFICIAL["UMT5 text encoder"]]) == "UMT5 text encoder"


@pytest.mark.parametrize("suffix", ["lora_A.weight", "lora_B.default.weight", "hada_w1_a", "lokr_w1"])
def test_a_lora_is_not_taken_for_its_base(suffix: str) -> None:
    name = f"diffusion_model.blocks.0.cross_attn.k.{suffix}"
    assert kind_of([name, "time_projection.1.weight", "blocks.0.cross_attn.k.weight"]) == "LoRA"


def test_unknown() -> None:
    assert kind_of(["conv.weight", "conv.bias"]) is None
    assert kind_of([]) is None


def test_all_layouts_of_a_kind_belong_to_the_same_place() -> None:
    assert len({(kind.name, kind.flag, kind.remedy) for kind in KINDS}) == len({kind.name for kind in KINDS})


def checkpoint_of(names: Iterable[str], flag: str = "--dit") -> Checkpoint:
    file = Path("some.safetensors")
    tensors = {name: TensorInfo(file=file, key=name, dtype="F32", shape=(1,)) for name in names}
    return Checkpoint(flag=flag, path=file, files=(file,), tensors=tensors, config={})


def test_the_wrong_kind_is_named_with_its_place() -> None:
    names = ["vae.encoder.down_blocks.0.resnets.0.conv1.conv.weight", "vae.decoder.conv_in.conv.weight"]
    expected = (
        "--dit: got some.safetensors, a HunyuanVideo VAE; expected a FramePack transformer; that file belongs to --vae"
    )
    with pytest.raises(UserError) as error:
        expect_kind(checkpoint_of(names), "FramePack transformer")
    assert str(error.value) == expected
    expect_kind(checkpoint_of(names), "HunyuanVideo VAE")


def test_the_right_flag_with_the_wrong_architecture() -> None:
    with pytest.raises(UserError, match="a Wan transformer; expected a FramePack transformer; check the path"):
        expect_kind(checkpoint_of(OFFICIAL["Wan transformer"]), "FramePack transformer")
    with pytest.raises(UserError, match="got some.safetensors, an image VAE; expected a HunyuanVideo VAE"):
        expect_kind(checkpoint_of(OFFICIAL["image VAE"], "--vae"), "HunyuanVideo VAE")


def test_a_file_of_no_kind() -> None:
    with pytest.raises(UserError, match=r"2 tensors of no model known here, conv\.weight first"):
        expect_kind(checkpoint_of(["conv.weight", "conv.bias"]), "FramePack transformer")
