"""What tests of Wan's training share: caches written by the published facts alone, runs on small models, an oracle.

Shapes: F latent frames, h w latent size, L rows of text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

import wan_train_network
from dataset.epochs import ItemKey
from dataset.training_dataset import TrainBatch
from demo.wan_models import WanModelPaths
from tests.cache_builders import write_config
from tests.train_caches import image_set, video_set
from tests.training_driver import Workshop, final_file
from tests.wan_transformers import CONFIGS, HEIGHT, WIDTH, build_transformer, random
from training.objective import BatchLoss, Objective
from training.timesteps import draw_noise, item_seed
from wan.architecture import WanArchitecture

TEXT_WIDTH, IMAGE_WIDTH = CONFIGS["i2v"].text_width, CONFIGS["i2v"].image_width
NUM_FRAMES = 3
PLACES = {False: f"{8 * WIDTH:04d}x{8 * HEIGHT:04d}", True: f"00000-009_{8 * WIDTH:04d}x{8 * HEIGHT:04d}"}
"""What is between stem and `_wan` in the name of an image's and of a clip's cache."""
SEED = 3
Contents = dict[str, Tensor]


# ---- what is cached ----


def clip_item(number: int, *, both_ends: bool = False, num_frames: int = NUM_FRAMES) -> Contents:
    """A clip with its first frame, a control clip, and what CLIP saw. No tool writes the last frame but ours."""
    masks = torch.zeros(4, num_frames, HEIGHT, WIDTH)
    masks[:, 0] = 1
    if both_ends:
        masks[3, -1] = 1
    return {
        "latents": latents(num_frames, seed=100 * number),
        "latents_image": torch.cat([masks.bfloat16(), latents(num_frames, seed=100 * number + 1)]),
        "latents_control": latents(num_frames, seed=100 * number + 2),
        "clip": features(2, number) if both_ends else features(1, number)[0],
        "t5": text(number),
    }


def one_frame_item(number: int, indices: Sequence[int] = (0, 1), *, target: int = 1) -> Contents:
    """One picture at `target` among control images, of which one half is hidden by its mask."""
    place, count = indices.index(target), len(indices)
    clean = latents(count, seed=100 * number)
    shown = torch.cat([torch.ones(4, count, HEIGHT, WIDTH).bfloat16(), clean])
    shown[4:, :, :, WIDTH // 2 :] = 0
    shown[:4, place] = 0
    shown[4:, place] = latents(1, seed=99)[:, 0]
    return {
        "latents": clean,
        "latents_image": shown,
        "clip": features(count - 1, number),
        "f_indices": torch.tensor(indices, dtype=torch.int32),
        "t5": text(number),
    }


def latents(num_frames: int, *, seed: int) -> Tensor:
    return random(16, num_frames, HEIGHT, WIDTH, seed=seed).bfloat16()


def features(count: int, number: int) -> Tensor:
    return random(count, 257, IMAGE_WIDTH, seed=100 * number + 3).half()


def text(number: int) -> Tensor:
    """A longer one for each number."""
    return random(3 + 4 * number, TEXT_WIDTH, seed=100 * number + 4).bfloat16()


def loss_mask(num_frames: int, place: int) -> Tensor:
    """(1, F, h, w) of one-frame training: the picture's counts in part, controls' everywhere."""
    mask = torch.ones(1, num_frames, HEIGHT, WIDTH)
    mask[:, place, :, : WIDTH // 2] = 0
    mask[:, place, 0, -1] = 0.5
    return mask.bfloat16()


# ---- files ----


def write_data(folder: Path, items: Mapping[str, Contents], *, batch_size: int = 2, **keys: object) -> Path:
    """Name -> contents as a data set with caches in the published layout, which say nothing of how they were made."""
    contents = next(iter(items.values()))
    is_video, is_one_frame = contents["latents"].shape[1] > 1 and "f_indices" not in contents, "f_indices" in contents
    dataset = (video_set if is_video else image_set)(folder, tuple(items))
    for name, item in items.items():
        write_caches(folder / "cache", name, item, is_video=is_video)
    common = {"cache_directory": folder / "cache", "resolution": [8 * WIDTH, 8 * HEIGHT], "batch_size": batch_size}
    if is_video:
        place = {"video_directory": dataset.video_directory, "target_frames": [4 * NUM_FRAMES - 3]}
    else:
        place = {"image_directory": dataset.image_directory}
    if is_one_frame:
        indices, target = contents["f_indices"].tolist(), keys.pop("target", 1)
        place |= {"fp_1f_target_index": target, "fp_1f_clean_indices": [i for i in indices if i != target]}
        place |= write_controls(folder, items, len(indices) - 1)
    return write_config(folder / "データ.toml", common | place | keys)


def write_controls(folder: Path, names: Sequence[str], count: int) -> dict[str, Path]:
    """As many as there are places, though nobody looks at them."""
    for name in names:
        for number in range(count):
            (folder / "controls" / f"{name}_{number}.png").write_text("control", encoding="utf-8")
        (folder / "controls" / f"{name}.png").unlink()
    return {"control_directory": folder / "controls"}


def write_caches(folder: Path, stem: str, contents: Contents, *, is_video: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    shape = "x".join(map(str, contents["latents"].shape[1:]))
    tensors = {}
    for name, tensor in contents.items():
        if name != "t5":
            key = f"{name}_{shape}" if name.startswith("latents") else name
            tensors[f"{key}_{'int32' if name == 'f_indices' else 'bfloat16'}"] = tensor
    said = {"architecture": "wan", "format_version": "1.0.1"}
    size = {"width": str(8 * WIDTH), "height": str(8 * HEIGHT)} | ({"frame_count": "9"} if is_video else {})
    save_file(tensors, folder / f"{stem}_{PLACES[is_video]}_wan.safetensors", metadata=said | size)
    te = {"varlen_t5_bfloat16": contents["t5"]}
    save_file(te, folder / f"{stem}_wan_te.safetensors", metadata=said | {"caption1": f"caption of {stem}"})


# ---- runs ----


@dataclass(frozen=True, kw_only=True)
class WanShop(Workshop):
    """A transformer, and data for a task."""

    task: str

    def command(self, output: Path, **changes: object) -> list[str]:
        flags = {"task": self.task, "network_module": "networks.lora_wan", "timestep_sampling": "uniform"}
        return super().command(output, **(flags | changes))


def write_dit(folder: Path, kind: str) -> Path:
    path = folder / f"変換器 {kind}.safetensors"
    if not path.is_file():
        save_file(build_transformer(kind).state_dict(), path)
    return path


def train(command: Sequence[str]) -> int:
    """The exit code."""
    return wan_train_network.main(list(command))


def trained(command: Sequence[str]) -> Contents:
    """What the file holds of a run that ends well."""
    assert train(command) == 0
    return load_file(final_file(command))


@dataclass(frozen=True, kw_only=True)
class FirstStep:
    """What the transformer is given in a run's first step, and what comes of it. The network is zero still."""

    noisy: Tensor
    sigmas: Tensor
    batch: TrainBatch
    velocity: Tensor
    loss: BatchLoss

    @property
    def noise(self) -> Tensor:
        """As training draws it."""
        return noise_of(self.batch.items, self.velocity.shape[1:])


def noise_of(items: Sequence[ItemKey], shape: torch.Size, epoch: int = 0) -> Tensor:
    return draw_noise([item_seed(SEED, epoch, key) for key in items], shape)


def first_step(command: Sequence[str]) -> FirstStep:
    found: dict[str, object] = {}

    def predict(self, transformer, noisy, sigmas, batch):
        velocity = predict_velocity(self, transformer, noisy, sigmas, batch)
        found.update(noisy=noisy, sigmas=sigmas, batch=batch, velocity=velocity.detach())
        return velocity

    def measure(self, *given, **named):
        found["loss"] = loss_of(self, *given, **named)
        return found["loss"]

    predict_velocity, loss_of = WanArchitecture.predict_velocity, Objective.__call__
    with patch.object(WanArchitecture, "predict_velocity", predict), patch.object(Objective, "__call__", measure):
        assert train([*command, "--max_train_steps", "1"]) == 0
    return FirstStep(**found)


# ---- a transformer that can be taught a picture in a few steps ----


def write_denoiser(models: WanModelPaths, file: Path) -> Path:
    """A demo transformer as one that removes all noise, by hand: v = PULL x, and its random blocks add a little.

    What is left when noise is gone, a LoRA can learn. Two of its blocks are enough.
    """
    tensors = {name: t.float() for name, t in load_file(models.dit).items() if not name.startswith("blocks.2.")}
    place = torch.arange(NUM_VALUES)
    embed, head = tensors["patch_embedding.weight"], tensors["head.head.weight"]
    for name in WEAK:
        for tensor in (tensors[other] for other in tensors if name in other):
            tensor *= 0.2
    for name in ("patch_embedding.bias", "time_embedding.2.bias", "head.modulation", "head.head.bias"):
        tensors[name].zero_()
    embed[:NUM_VALUES] = 0
    embed[place, :16] = torch.eye(NUM_VALUES).view(NUM_VALUES, 16, 1, 2, 2)
    # They outweigh the others, so that a layer norm divides every token by about the same number.
    tensors["patch_embedding.bias"][place + NUM_VALUES] = SIZE * torch.tensor([1.0, -1.0]).repeat(NUM_VALUES // 2)
    head[:, :NUM_VALUES] = 0
    head[place, place.view(16, 2, 2).permute(1, 2, 0).flatten()] = PULL * SIZE / 2
    save_file(tensors, file)
    return file


NUM_VALUES, SIZE, PULL = 64, 4.0, 3.0
"""Values of a patch; of the channels that tell nothing; of what leads away from noise."""
WEAK = (".o.", ".ffn.2.", "patch_embedding.weight", "time_embedding.2.weight", "head.head.weight")


# ---- the oracle ----


def shown_by_the_facts(contents: Contents, task: str) -> Tensor | None:
    """(C, F, h, w) what lies beside the noisy latents."""
    if task.endswith("-FC"):
        given = torch.zeros_like(contents["latents_control"])
        if task.startswith("i2v"):
            given[:, 0] = contents["latents_image"][4:, 0]
        return torch.cat([contents["latents_control"], given])
    return None if task.startswith("t2") else contents["latents_image"]


def seen_by_the_facts(contents: Contents, task: str) -> Tensor | None:
    """(N, 257, D) CLIP features; those of nothing for text-to-video Fun-Control."""
    if task.startswith("t2"):
        return torch.zeros(1, 257, IMAGE_WIDTH) if task.endswith("-FC") else None
    clip = contents["clip"].reshape(-1, 257, IMAGE_WIDTH)
    return clip[[0, -1]] if task.startswith("flf2v") else clip[:1]


def oracle_velocity(
    oracle: WanTransformer3DModel, contents: Contents, task: str, noisy: Tensor, sigma: Tensor
) -> Tensor:
    """diffusers' for an item as it is cached; noisy (C, F, h, w) at noise level sigma ()."""
    shown, seen = shown_by_the_facts(contents, task), seen_by_the_facts(contents, task)
    text = torch.zeros(1, 512, TEXT_WIDTH)
    text[0, : len(contents["t5"])] = contents["t5"]
    whole = noisy if shown is None else torch.cat([noisy, shown.float()])
    image = None if seen is None else seen.float()
    with patch.object(oracle.rope, "forward", rope_at(oracle, contents.get("f_indices"))):
        return oracle(whole[None], 1000 * sigma[None], text, encoder_hidden_states_image=image, return_dict=False)[0][0]


def rope_at(oracle: WanTransformer3DModel, indices: Tensor | None) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """diffusers' tables of a clip that is long enough, and of these the frames with the given indices."""
    forward = oracle.rope.forward

    def tables(hidden: Tensor) -> tuple[Tensor, Tensor]:
        if indices is None:
            return forward(hidden)
        batch, channels, _, height, width = hidden.shape
        whole = forward(hidden.new_zeros(batch, channels, int(indices.max()) + 1, height, width))
        per_frame = height * width // 4
        return tuple(table.unflatten(1, (-1, per_frame))[:, indices.long()].flatten(1, 2) for table in whole)

    return tables
