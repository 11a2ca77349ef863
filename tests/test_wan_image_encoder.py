"""Wan's CLIP against transformers' whole model, from every layout of its file."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModel

from common.weights import check_names_and_shapes
from options.errors import UserError
from tests.published import described, published_shapes
from wan import image_encoder as ours

WIDTH = 160
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def clip_model(**changes) -> CLIPVisionModel:
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 96}
    published = {"image_size": 224, "patch_size": 14, "layer_norm_eps": 1e-5, "hidden_act": "gelu"}
    torch.manual_seed(0)
    model = CLIPVisionModel(CLIPVisionConfig(**{**published, **sizes, **changes})).eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model.requires_grad_(False)


def official(model: CLIPVisionModel) -> dict[str, torch.Tensor]:
    """The published table backwards: what transformers keeps apart is joined, and the text model is beside it."""
    state = model.state_dict()
    names = {"self_attn.out_proj": "attn.proj", "layer_norm": "norm", "mlp.fc1": "mlp.0", "mlp.fc2": "mlp.2"}
    made = {"log_scale": torch.tensor(1.0), "textual.norm.weight": torch.ones(4)}
    made["visual.cls_embedding"] = state["embeddings.class_embedding"].view(1, 1, -1)
    made["visual.pos_embedding"] = state["embeddings.position_embedding.weight"][None]
    made["visual.patch_embedding.weight"] = state["embeddings.patch_embedding.weight"]
    made["visual.head"] = torch.zeros(model.config.hidden_size, 7)
    for leaf in ("weight", "bias"):
        made[f"visual.pre_norm.{leaf}"] = state[f"pre_layrnorm.{leaf}"]
        made[f"visual.post_norm.{leaf}"] = state[f"post_layernorm.{leaf}"]
        for i in range(model.config.num_hidden_layers):
            parts = [state[f"encoder.layers.{i}.self_attn.{letter}_proj.{leaf}"] for letter in "qkv"]
            made[f"visual.transformer.{i}.attn.to_qkv.{leaf}"] = torch.cat(parts)
    for name, tensor in state.items():
        if (found := re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)", name)) and not re.search(r"[qkv]_proj", name):
            rest = found[2]
            for theirs, short in names.items():
                rest = rest.replace(theirs, short)
            made[f"visual.transformer.{found[1]}.{rest}"] = tensor
    return {name: tensor.contiguous() for name, tensor in made.items()}


@pytest.fixture(scope="module")
def reference() -> CLIPVisionModel:
    return clip_model()


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    from skimage.data import chelsea

    return chelsea()


def load(path: Path, **options) -> CLIPVisionModel:
    return ours.load_clip(ours.open_clip(path, **options), dtype=torch.float32, device="cpu")


def saved(folder: Path, tensors: dict[str, torch.Tensor], name: str = "clip.safetensors") -> Path:
    save_file(tensors, folder / name)
    return folder / name


def wanted_features(model: CLIPVisionModel, picture: np.ndarray) -> torch.Tensor:
    """The facts by hand: [-1, 1] floats, bicubic without antialiasing, CLIP's mean and deviation, one block less."""
    pixels = torch.from_numpy(picture.copy()).permute(2, 0, 1)[None].float().div(127.5).sub(1)
    size = (model.config.image_size, model.config.image_size)
    pixels = F.interpolate(pixels, size=size, mode="bicubic", align_corners=False, antialias=False)
    mean, deviation = (torch.tensor(numbers).view(1, 3, 1, 1) for numbers in (MEAN, STD))
    pixels = (pixels.mul(0.5).add(0.5) - mean) / deviation
    return model(pixel_values=pixels, output_hidden_states=True).hidden_states[-2]


def assert_close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() <= 1e-6 * wanted.abs().max()


def official_pickle(folder: Path, model: CLIPVisionModel) -> Path:
    path = folder / "\u91cd\u307f models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
    torch.save(official(model), path)
    return path


def official_file(folder: Path, model: CLIPVisionModel) -> Path:
    return saved(folder, official(model))


def visual_alone(folder: Path, model: CLIPVisionModel) -> Path:
    tensors = {name[7:]: tensor for name, tensor in official(model).items() if name.startswith("visual.")}
    return saved(folder, tensors)


def comfyui_file(folder: Path, model: CLIPVisionModel) -> Path:
    tensors = {f"vision_model.{name}": tensor for name, tensor in model.state_dict().items()}
    tensors["vision_model.embeddings.position_ids"] = torch.arange(257)[None]
    return saved(folder, tensors | {"visual_projection.weight": torch.zeros(8, WIDTH)}, "clip_vision_h.safetensors")


def snapshot(folder: Path, model: CLIPVisionModel) -> Path:
    model.save_pretrained(folder / "image_encoder")
    return folder


@pytest.mark.parametrize("memmap", [True, False])
@pytest.mark.parametrize("form", [official_pickle, official_file, visual_alone, comfyui_file, snapshot])
def test_forms(reference, picture, tmp_path: Path, form: Callable[[Path, CLIPVisionModel], Path], memmap: bool) -> None:
    checkpoint = ours.open_clip(form(tmp_path, reference), memmap=memmap)
    assert checkpoint.shapes == {name: tuple(tensor.shape) for name, tensor in reference.state_dict().items()}
    model = ours.load_clip(checkpoint, dtype=torch.float32, device="cpu")
    features = ours.encode_pictures(model, [picture])
    assert features.shape == (1, 257, WIDTH) and features.dtype == torch.float32 and not features.requires_grad
    assert_close(features, wanted_features(reference, picture))


def test_the_last_block_is_neither_read_nor_kept(reference, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    model = load(official_file(tmp_path, reference))
    assert len(model.encoder.layers) == 2 and not list(model.post_layernorm.parameters())
    assert "--clip: 37 tensors" in caplog.text  # 5 before and 2 x 16 in the blocks
    assert torch.equal(model.embeddings.position_ids, torch.arange(257)[None])


@pytest.mark.parametrize("size", [(224, 224), (3, 3), (3, 500), (640, 416), (300, 225)])
def test_any_size(reference, tmp_path: Path, size: tuple[int, int]) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    model = load(official_file(tmp_path, reference))
    assert_close(ours.encode_pictures(model, [picture]), wanted_features(reference, picture))


def test_pictures_of_several_sizes_in_one_batch(reference, tmp_path: Path) -> None:
    noise = np.random.default_rng(0)
    pictures = [noise.integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((64, 48), (400, 200), (224, 224))]
    pictures[0] = pictures[0][:, ::-1]  # a view with a negative stride, as flipped pictures are
    together = ours.encode_pictures(load(official_file(tmp_path, reference)), pictures)
    for features, picture in zip(together, pictures, strict=True):
        wanted = wanted_features(reference, picture)[0]
        assert (features - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_types(reference, picture: np.ndarray, tmp_path: Path, dtype: torch.dtype) -> None:
    model = ours.load_clip(ours.open_clip(official_file(tmp_path, reference)), dtype=dtype, device="cpu")
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    found, wanted = ours.encode_pictures(model, [picture]), wanted_features(reference, picture)
    assert found.dtype == torch.float32 and (found - wanted).abs().max() < 0.05 * wanted.abs().max()


def test_what_shapes_do_not_tell_comes_from_the_config(picture: np.ndarray, tmp_path: Path) -> None:
    whole = clip_model(num_attention_heads=8, hidden_act="quick_gelu", layer_norm_eps=0.1, image_size=56)
    assert_close(ours.encode_pictures(load(snapshot(tmp_path, whole)), [picture]), wanted_features(whole, picture))


def test_the_published_size() -> None:
    shapes = published_shapes("wan_clip")
    infos = described("--clip", shapes, "F16").tensors
    pairs = [pair for n, i in infos.items() if n.startswith("visual.") for pair in ours._in_transformers(n[7:], i)]
    checkpoint = described("--clip", {name: info.shape for name, info in pairs}, "F16")
    model = ours.build_clip(checkpoint)
    check_names_and_shapes(model, checkpoint)
    assert len(shapes) == 784 and len(pairs) == len(checkpoint.tensors)
    found = (model.config.num_attention_heads, model.config.num_hidden_layers, model.config.image_size)
    assert found == (16, 32, 224)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("visual.post_norm.bias", None, r"no post_layernorm\.bias \(1 missing of"),
        ("visual.transformer.2.mlp.0.weight", None, r"no encoder\.layers\.2\.mlp\.fc1\.weight"),
        ("visual.pos_embedding", None, r"\d+ tensors without embeddings\.position_embedding\.weight"),
        ("visual.extra", torch.zeros(1), r"1 unexpected tensors, extra first"),
        ("visual.transformer.1.attn.to_qkv.weight", torch.zeros(3, WIDTH), r"encoder\.layers\.1\.self_attn\.k_proj\."),
        ("visual.transformer.1.attn.to_qkv.bias", torch.zeros(()), r"encoder\.layers\.1\.self_attn\.k_proj\.bias of"),
        ("visual.cls_embedding", torch.zeros(2, 1, WIDTH), r"embeddings\.class_embedding of shape \(2, 160\)"),
        ("visual.patch_embedding.weight", torch.zeros(250, 3, 14, 14), r"shapes that do not fit .*80, the width"),
    ],
)
def test_broken_files(reference, tmp_path: Path, name: str, tensor: torch.Tensor | None, message: str) -> None:
    tensors = {key: value for key, value in (official(reference) | {name: tensor}).items() if value is not None}
    with pytest.raises(UserError, match=rf"--clip .*clip\.safetensors: got {message}"):
        load(saved(tmp_path, tensors))


def test_another_models_file(tmp_path: Path) -> None:
    names = ("vision_model.embeddings.patch_embedding.weight", "vision_model.encoder.layers.0.self_attn.q_proj.weight")
    with pytest.raises(UserError, match="a SigLIP image encoder; expected a CLIP image encoder; .*--image_encoder"):
        ours.open_clip(saved(tmp_path, {name: torch.zeros(1) for name in names}))
