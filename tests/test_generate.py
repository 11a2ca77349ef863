"""`fpack_generate_video.py` run in-process on small checkpoints in the published layouts and real photographs."""

import shutil
import weakref
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from skimage import data_dir

import fpack_generate_video
from common.flags import parse
from common.media import fit, read_video
from frame_pack import conditioning
from frame_pack import pipeline as pipeline_module
from frame_pack.compute import Compute
from frame_pack.loading import open_models
from frame_pack.pipeline import FramePackPipeline
from generation.pipeline import Failure
from modules.flow_matching import denoised, resolution_mu, shifted_sigmas
from modules.samplers import unipc
from options.flags_fpack_generate import FramePackGenerateFlags
from options.fpack_request import FramePackRequestFlags

PHOTOS = Path(data_dir)
SIZE = 64


@pytest.fixture
def models(demo_models) -> list[str]:
    """The flags that name the five models."""
    names = ("dit", "vae", "text_encoder1", "text_encoder2", "image_encoder")
    return [part for name in names for part in (f"--{name}", str(getattr(demo_models, name)))]


@pytest.fixture(scope="session")
def cat(tmp_path_factory) -> str:
    """A photograph under a Japanese name with brackets, as users have them."""
    path = tmp_path_factory.mktemp("写真 [x]") / "猫 [1].png"
    shutil.copy(PHOTOS / "chelsea.png", path)
    return str(path)


COFFEE = str(PHOTOS / "coffee.png")
QUICK = ["--prompt", "窓辺の猫", "--seed", "1", "--infer_steps", "2", "--video_size", str(SIZE), str(SIZE)]


def run(*argv: str | Path) -> int:
    return fpack_generate_video.main([str(part) for part in argv])


def only_file(folder: Path, pattern: str) -> Path:
    (path,) = folder.glob(pattern)
    return path


def latent_of(path: Path) -> tuple[torch.Tensor, dict[str, str]]:
    with safe_open(path, framework="pt") as file:
        return file.get_tensor("latent"), file.metadata() or {}


def test_kisekaeichi_equals_diffusers_from_picture_to_picture(models, demo_models, cat, tmp_path):
    """Encoders, VAE and transformer of diffusers and transformers, masks by hand, and the sampler around them."""
    from diffusers import AutoencoderKLHunyuanVideo, HunyuanVideoFramepackTransformer3DModel
    from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE, HunyuanVideoPipeline
    from transformers import AutoTokenizer, CLIPTextModel, LlamaModel, SiglipImageProcessorPil, SiglipVisionModel

    mask = np.zeros((SIZE, SIZE), dtype=np.uint8)
    mask[:, : SIZE // 2] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    clothes = Image.open(COFFEE).convert("RGB").resize((SIZE, SIZE))
    clothes.putalpha(Image.fromarray(255 - mask))
    clothes.save(tmp_path / "服.png")
    code = run(
        *models,
        *QUICK,
        *("--image_path", cat, "--control_image_path", cat, tmp_path / "服.png"),
        *("--control_image_mask_path", tmp_path / "mask.png"),
        *("--one_frame_inference", "target_index=1,control_index=0;10,no_2x,no_4x,no_post"),
        *("--output_type", "latent_images", "--save_path", tmp_path / "out"),
    )
    assert code == 0
    ours, _ = latent_of(only_file(tmp_path / "out", "*_latent.safetensors"))

    hunyuan = demo_models.vae
    vae = AutoencoderKLHunyuanVideo.from_pretrained(hunyuan, subfolder="vae", torch_dtype=torch.float32)
    transformer = HunyuanVideoFramepackTransformer3DModel.from_pretrained(demo_models.dit, torch_dtype=torch.float32)
    folder = demo_models.image_encoder
    siglip = SiglipVisionModel.from_pretrained(folder, subfolder="image_encoder", dtype=torch.float32)
    text_pipeline = HunyuanVideoPipeline(
        text_encoder=LlamaModel.from_pretrained(hunyuan, subfolder="text_encoder", dtype=torch.float32),
        tokenizer=AutoTokenizer.from_pretrained(hunyuan, subfolder="tokenizer"),
        text_encoder_2=CLIPTextModel.from_pretrained(hunyuan, subfolder="text_encoder_2", dtype=torch.float32),
        tokenizer_2=AutoTokenizer.from_pretrained(hunyuan, subfolder="tokenizer_2"),
        transformer=None,
        vae=vae,
        scheduler=None,
    )
    photo = fit(np.asarray(Image.open(cat).convert("RGB")), SIZE, SIZE)
    pictures = [photo, np.asarray(clothes)[..., :3]]
    with torch.no_grad():
        template = DEFAULT_PROMPT_TEMPLATE["template"]
        prefix = text_pipeline.tokenizer(template.partition("{}")[0]).input_ids
        llama, pooled, attention_mask = text_pipeline.encode_prompt(
            "窓辺の猫", prompt_template={"template": template, "crop_start": len(prefix)}
        )
        processor = SiglipImageProcessorPil(
            size={"height": 384, "width": 384}, image_mean=[0.5] * 3, image_std=[0.5] * 3, resample=3
        )
        pixels = processor(images=Image.fromarray(photo), return_tensors="pt")["pixel_values"]
        features = siglip(pixels).last_hidden_state
        controls = []
        for picture, part in zip(pictures, (mask, 255 - mask), strict=True):
            tensor = torch.from_numpy(picture / 127.5 - 1).float().permute(2, 0, 1)[None, :, None]
            small = Image.fromarray(part).resize((SIZE // 8, SIZE // 8), Image.Resampling.LANCZOS)
            latent = vae.encode(tensor).latent_dist.mean * 0.476986
            controls.append(latent * torch.from_numpy(np.asarray(small) / 255).float())
        transformer._pack_history_states = without_histories(transformer)
        sigmas = shifted_sigmas(2, resolution_mu(SIZE * SIZE // 256))

        def denoise(x, step):
            velocity = transformer(
                hidden_states=x,
                timestep=1000 * sigmas[step : step + 1].float(),
                encoder_hidden_states=llama,
                encoder_attention_mask=attention_mask,
                pooled_projections=pooled,
                image_embeds=features,
                guidance=torch.tensor([9984.0]),
                indices_latents=torch.tensor([1]),
                latents_clean=torch.cat(controls, dim=2),
                indices_latents_clean=torch.tensor([0, 10]),
                latents_history_2x=torch.zeros_like(x),
                indices_latents_history_2x=torch.tensor([0]),
                latents_history_4x=torch.zeros_like(x),
                indices_latents_history_4x=torch.tensor([0]),
                return_dict=False,
            )[0]
            return denoised(x, velocity, float(sigmas[step]))

        noise = torch.randn(1, 16, 1, SIZE // 8, SIZE // 8, generator=torch.Generator().manual_seed(1))
        theirs = unipc(denoise, noise, sigmas)
        decoded = vae.decode(theirs / 0.476986).sample[0, :, 0].permute(1, 2, 0)
    assert (ours - theirs[0]).abs().max() / theirs.abs().max() < 1e-4
    saved = np.asarray(Image.open(only_file(tmp_path / "out", "*.png"))).astype(int)
    assert np.abs(saved - ((decoded + 1) / 2).clamp(0, 1).mul(255).numpy().astype(int)).max() <= 1


def without_histories(transformer):
    """diffusers' packing with both histories left out; its forward demands them as inputs."""
    pack = type(transformer)._pack_history_states
    return lambda hidden, clean, far_2x, far_4x, *rest: pack(transformer, hidden, clean, None, None, *rest)


def test_the_same_command_gives_the_same_bytes(models, cat, tmp_path, encoded_videos):
    for name in "ab":
        argv = ["--image_path", cat, "--video_sections", "1", "--output_type", "both", "--save_path", tmp_path / name]
        assert run(*models, *QUICK, *argv, "--latent_window_size", "1") == 0
    first, second = (only_file(tmp_path / name, "*.safetensors").read_bytes() for name in "ab")
    assert first == second
    assert len(encoded_videos) == 2 and encoded_videos[0] == encoded_videos[1]


def test_a_video_has_all_its_frames_at_the_given_rate(models, cat, tmp_path):
    argv = ["--image_path", cat, "--video_sections", "2", "--latent_window_size", "2", "--fps", "24"]
    assert run(*models, *QUICK, *argv, "--save_path", tmp_path) == 0
    frames = list(read_video(only_file(tmp_path, "*_1.mp4"), flag="result"))
    assert len(frames) == 4 * 2 * 2 + 1
    assert frames[0].shape == (SIZE, SIZE, 3)


def suffixes(folder: Path) -> list[str]:
    return sorted(path.suffix for path in folder.iterdir())


def test_decoding_a_saved_latent_needs_only_the_vae_and_gives_the_same_picture(models, demo_models, cat, tmp_path):
    argv = ["--image_path", cat, "--one_frame_inference", "default", "--output_type", "latent_images"]
    assert run(*models, *QUICK, *argv, "--save_path", tmp_path / "a") == 0
    assert suffixes(tmp_path / "a") == [".png", ".safetensors"]
    latent = only_file(tmp_path / "a", "*_latent.safetensors")
    argv = ["--latent_path", latent, "--vae", demo_models.vae, "--output_type", "images", "--save_path", tmp_path / "b"]
    assert run(*argv) == 0
    again = only_file(tmp_path / "b", "*.png")
    assert again.name.endswith(f"_1_{latent.stem}.png")
    assert again.read_bytes() == only_file(tmp_path / "a", "*.png").read_bytes()


def test_a_saved_video_latent_decodes_with_the_window_it_was_made_with(
    models, demo_models, cat, tmp_path, encoded_videos
):
    argv = ["--image_path", cat, "--video_sections", "3", "--latent_window_size", "2", "--output_type", "both"]
    assert run(*models, *QUICK, *argv, "--save_path", tmp_path / "a") == 0
    latent = only_file(tmp_path / "a", "*_latent.safetensors")
    assert run("--latent_path", latent, "--vae", demo_models.vae, "--save_path", tmp_path / "b") == 0
    assert len(encoded_videos) == 2 and encoded_videos[0] == encoded_videos[1]


def test_a_saved_latent_of_one_frame_decodes_to_a_picture(models, demo_models, cat, tmp_path):
    argv = ["--image_path", cat, "--one_frame_inference", "default", "--output_type", "latent"]
    assert run(*models, *QUICK, *argv, "--save_path", tmp_path / "a") == 0
    latent = only_file(tmp_path / "a", "*_latent.safetensors")
    assert run("--latent_path", latent, "--vae", demo_models.vae, "--save_path", tmp_path / "b") == 0
    assert only_file(tmp_path / "b", "*").suffix == ".png"


def test_latents_carry_their_settings_unless_told_otherwise(models, cat, tmp_path):
    argv = ["--image_path", cat, "--one_frame_inference", "default", "--output_type", "latent"]
    assert run(*models, *QUICK, *argv, "--save_path", tmp_path / "a") == 0
    assert suffixes(tmp_path / "a") == [".safetensors"]
    _, metadata = latent_of(only_file(tmp_path / "a", "*.safetensors"))
    assert (metadata["seeds"], metadata["prompt"], metadata["height"]) == ("1", "窓辺の猫", str(SIZE))
    assert run(*models, *QUICK, *argv, "--no_metadata", "--save_path", tmp_path / "b") == 0
    assert latent_of(only_file(tmp_path / "b", "*.safetensors"))[1] == {}


def test_every_input_of_one_frame_inference_changes_the_picture(models, cat, tmp_path):
    """Nothing that a user gives may be ignored in silence. All requests go through one run of the pipeline."""
    white, half = (np.full((SIZE, SIZE), 255, dtype=np.uint8) for _ in range(2))
    half[:, SIZE // 2 :] = 0
    Image.fromarray(white).save(tmp_path / "white.png")
    Image.fromarray(half).save(tmp_path / "half.png")
    base = FramePackRequestFlags(
        prompt="a cat",
        image_path=cat,
        control_image_path=(cat, COFFEE),
        control_image_mask_path=(str(tmp_path / "white.png"),),
        one_frame_inference="target_index=1,control_index=0;10",
        video_size=(SIZE, SIZE),
        infer_steps=2,
        seed=1,
    )
    variants = {
        "nothing": {},
        "target": {"one_frame_inference": "target_index=9,control_index=0;10"},
        "index": {"one_frame_inference": "target_index=1,control_index=0;13"},
        "order": {"one_frame_inference": "target_index=1,control_index=10;0"},
        "no post": {"one_frame_inference": "target_index=1,control_index=0;10,no_post"},
        "no 2x": {"one_frame_inference": "target_index=1,control_index=0;10,no_2x"},
        "no 4x": {"one_frame_inference": "target_index=1,control_index=0;10,no_4x"},
        "mask": {"control_image_mask_path": (str(tmp_path / "half.png"),)},
        "control": {"control_image_path": (cat, cat)},
        "start": {"image_path": COFFEE},
        "prompt": {"prompt": "a dog"},
        "window": {"latent_window_size": 5},
        "distilled guidance": {"embedded_cfg_scale": 3.0},
        "guidance": {"guidance_scale": 2.0, "negative_prompt": "blurry"},
        "system prompt": {"custom_system_prompt": "Describe a picture."},
        "rope scaling": {"rope_scaling_timestep_threshold": 500},
        "flow shift": {"flow_shift": 5.0},
        "seed": {"seed": 2},
    }
    assert_every_variant_differs(models, base, variants)


def test_every_input_of_a_video_changes_the_video(models, cat, tmp_path):
    half = np.full((SIZE, SIZE), 255, dtype=np.uint8)
    half[:, SIZE // 2 :] = 0
    Image.fromarray(half).save(tmp_path / "half.png")
    base = FramePackRequestFlags(
        prompt="a cat",
        image_path=cat,
        video_size=(SIZE, SIZE),
        video_sections=2,
        latent_window_size=1,
        guidance_scale=3.0,
        infer_steps=1,
        seed=1,
    )
    variants = {
        "nothing": {},
        "start image": {"image_path": COFFEE},
        "section image": {"image_path": f"0:{cat};;;-1:{COFFEE}"},
        "section prompt": {"prompt": "0:a cat;;;1:a dog"},
        "mask": {"image_mask_path": str(tmp_path / "half.png")},
        "end image": {"end_image_path": COFFEE},
        "paddings": {"latent_paddings": "0,0"},
        "f1": {"f1": True},
        "rescale": {"guidance_rescale": 1.0},
        "negative prompt": {"negative_prompt": "blurry"},
    }
    assert_every_variant_differs(models, base, variants)


def assert_every_variant_differs(models: list[str], base: FramePackRequestFlags, variants: dict[str, dict]) -> None:
    """Only "nothing" may give the same latents as the base, and the same twice."""
    flags = parse(FramePackGenerateFlags, description="", argv=[*models, "--save_path", "unused"])
    pipeline = FramePackPipeline(open_models(flags.models), Compute.from_flags(flags.compute))
    requests = [replace(base, **changes).resolve(image_size=lambda path: (1, 1)) for changes in variants.values()]
    with pipeline.encoder() as encode:
        conditionings = list(encode(requests))
    with pipeline.denoiser() as denoise:
        results = [denoise(r, c, lambda progress: None) for r, c in zip(requests, conditionings, strict=True)]
    latents = dict(zip(variants, results, strict=True))
    for name, latent in latents.items():
        assert torch.equal(latent, latents["nothing"]) == (name == "nothing"), f"{name} has no effect"


def test_memory_flags_reach_the_models(models, monkeypatch):
    argv = ["--save_path", "unused", "--vae_chunk_size", "32", "--disable_numpy_memmap", "--dit_dtype", "bf16"]
    flags = parse(FramePackGenerateFlags, description="", argv=[*models, *argv, "--bulk_decode", "--vae_tiling"])
    compute = Compute.from_flags(flags.compute)
    assert (compute.vae_chunk_size, compute.vae_tile_size, compute.bulk_decode) == (32, 256, True)
    assert (compute.transformer_dtype, compute.encoder_dtype) == (torch.bfloat16, torch.float32)
    sized = parse(FramePackGenerateFlags, description="", argv=[*argv, "--vae_spatial_tile_sample_min_size", "128"])
    assert Compute.from_flags(sized.compute).vae_tile_size == 128
    checkpoints = open_models(flags.models)
    assert not any(checkpoint.memmap for checkpoint in vars(checkpoints).values())
    seen = {}
    monkeypatch.setattr("hunyuan_model.vae.load_vae", lambda checkpoint, **given: seen.update(given))
    compute.load_vae(checkpoints.vae)
    assert (seen["chunk_size"], seen["tile_size"], seen["dtype"]) == (32, 256, torch.float32)


def test_chunks_and_bulk_decoding_are_what_they_say(models, demo_models, cat, tmp_path):
    """Chunks change nothing; one piece differs from cross-faded sections."""
    common = [*models, *QUICK, "--image_path", cat, "--video_sections", "3", "--latent_window_size", "1"]
    assert run(*common, "--output_type", "latent", "--save_path", tmp_path) == 0
    latent = only_file(tmp_path, "*.safetensors")
    videos = {}
    for name, argv in {"plain": [], "chunks": ["--vae_chunk_size", "16"], "bulk": ["--bulk_decode"]}.items():
        decode = ["--latent_path", latent, "--vae", demo_models.vae, "--fps", "24", "--save_path", tmp_path / name]
        assert run(*decode, *argv) == 0
        videos[name] = np.stack(list(read_video(only_file(tmp_path / name, "*.mp4"), flag=name))).astype(int)
    assert np.abs(videos["chunks"] - videos["plain"]).mean() < 0.1
    assert np.abs(videos["bulk"] - videos["plain"]).mean() > 0.5
    with av.open(str(only_file(tmp_path / "bulk", "*.mp4"))) as container:
        assert container.streams.video[0].average_rate == 24


def test_a_failure_while_decoding_leaves_the_latents(models, cat, tmp_path, monkeypatch, caplog):
    def fail(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr("frame_pack.pipeline.decode_latents", fail)
    argv = ["--image_path", cat, "--one_frame_inference", "default", "--output_type", "images"]
    assert run(*models, *QUICK, *argv, "--save_path", tmp_path) == 1
    kept = only_file(tmp_path, "*_latent.safetensors")
    assert f"--latent_path {kept}" in caplog.text
    assert "prompt failed: RuntimeError: out of memory (test_generate.py:" in caplog.text
    assert "Traceback" not in caplog.text


def test_the_transformer_is_not_loaded_for_requests_that_all_failed(models, cat, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("frame_pack.pipeline.load_transformer", lambda *a, **k: pytest.fail("it was loaded"))
    monkeypatch.setattr("generation.check.check_image", lambda path, flag: None)
    argv = ["--image_path", tmp_path / "gone.png", "--one_frame_inference", "default"]
    assert run(*models, *QUICK, *argv, "--save_path", tmp_path / "out") == 1
    assert "gone.png" in caplog.text


def test_one_encoder_is_resident_at_a_time(models, cat, tmp_path, monkeypatch):
    """A 16 GB card holds LLaMA only when nothing else lies beside it."""
    alive: dict[str, weakref.ref] = {}
    beside: dict[str, list[str]] = {}
    for module, name in (("pipeline", "load_llama"), ("pipeline", "load_clip"), ("pipeline", "load_siglip")):
        target = f"frame_pack.{module}.{name}"
        original = getattr(pipeline_module, name)

        def load(*args, n=name, o=original, **kwargs):
            beside[n] = [other for other, model in alive.items() if model() is not None]
            model = o(*args, **kwargs)
            alive[n] = weakref.ref(model)
            return model

        monkeypatch.setattr(target, load)
    flags = parse(FramePackGenerateFlags, description="", argv=[*models, "--save_path", "unused"])
    pipeline = FramePackPipeline(open_models(flags.models), Compute.from_flags(flags.compute))
    request = FramePackRequestFlags.resolve(
        FramePackRequestFlags(prompt="a", image_path=cat, video_size=(SIZE, SIZE)), image_size=len
    )
    with pipeline.encoder() as encode:
        list(encode([request]))
    assert beside == {"load_llama": [], "load_clip": [], "load_siglip": []}
    broken = tmp_path / "broken.png"
    broken.write_bytes(Path(cat).read_bytes()[:2000])
    with pipeline.encoder() as encode:
        (failure,) = encode([replace(request, image_paths={0: str(broken)})])  # what failed is kept, the model is not
    assert isinstance(failure, Failure)
    assert all(model() is None for model in alive.values())


def test_equal_inputs_are_encoded_once_and_one_failure_leaves_the_others(models, cat, tmp_path, monkeypatch):
    encoded = []
    for name in ("encode_llama", "encode_image"):
        original = getattr(conditioning, name)
        monkeypatch.setattr(conditioning, name, lambda *a, n=name, o=original, **k: encoded.append(n) or o(*a, **k))
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    flags = parse(FramePackGenerateFlags, description="", argv=[*models, "--save_path", "unused"])
    pipeline = FramePackPipeline(open_models(flags.models), Compute.from_flags(flags.compute))
    base = FramePackRequestFlags(prompt="a cat", image_path=cat, one_frame_inference="default", video_size=(SIZE, SIZE))
    changes = ({"seed": 1}, {"seed": 2}, {"image_path": str(broken)})
    requests = [replace(base, **change).resolve(image_size=lambda path: (1, 1)) for change in changes]
    with pipeline.encoder() as encode:
        first, second, third = encode(requests)
    assert encoded == ["encode_llama", "encode_image"]
    assert first.siglip[0] is second.siglip[0]
    assert isinstance(third, Failure) and "broken.png" in str(third.error)


def test_auto_resize_gives_the_picture_the_ratio_of_the_control_image(models, cat, tmp_path):
    argv = ["--control_image_path", cat, "--one_frame_inference", "default", "--one_frame_auto_resize"]
    assert run(*models, *QUICK, *argv, "--output_type", "images", "--save_path", tmp_path / "結果") == 0
    assert suffixes(tmp_path / "結果") == [".png"]
    width, height = Image.open(only_file(tmp_path / "結果", "*.png")).size
    assert (width % 16, height % 16) == (0, 0) and width > height


def test_the_last_result_is_decoded_when_the_transformer_has_left(models, cat, tmp_path, monkeypatch):
    """A single prompt never holds transformer and VAE at once, on the device or in RAM."""
    alive = []
    original_load, original_decode = pipeline_module.load_transformer, pipeline_module.decode_latents

    def load(*args, **kwargs):
        model = original_load(*args, **kwargs)
        alive.append(weakref.ref(model))
        return model

    def decode(*args, **kwargs):
        assert [model() for model in alive] == [None]
        return original_decode(*args, **kwargs)

    monkeypatch.setattr("frame_pack.pipeline.load_transformer", load)
    monkeypatch.setattr("frame_pack.pipeline.decode_latents", decode)
    argv = ["--image_path", cat, "--one_frame_inference", "default", "--output_type", "images"]
    assert run(*models, *QUICK, *argv, "--save_path", tmp_path) == 0
