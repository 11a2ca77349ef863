"""A LoRA trained as a user would: a small data set with a rule in it, caches, a minute of training on the CPU.

The rule is as simple as can be, because the model is small and random: whatever the control image shows, the target is
a white disc. The pictures that it is learned from show an astronaut and a cup; it is tried on a cat.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from demo.data_set import quoted
from demo.material import Material
from demo.models import ModelPaths

CAPTION = "A white disc instead."
SIZE, NUM_CROPS = 96, 8
"""Pixels per side, and crops of each photograph."""
NUM_STEPS, SAMPLE_EVERY, SAMPLE_STEPS = 120, 40, 12
OPTIONS = "target_index=9,control_index=0,no_2x,no_4x,no_post"
NAME = "disc"
CONFIG = """\
[[datasets]]
image_directory = {targets}
control_directory = {controls}
cache_directory = {cache}
caption_extension = ".txt"
resolution = {size}
batch_size = 2
fp_1f_clean_indices = [0]
fp_1f_target_index = 9
fp_1f_no_post = true
"""


@dataclass(frozen=True, kw_only=True)
class Disc:
    """What is trained on, and what comes of it."""

    folder: Path
    config: Path
    prompts: Path
    """Samples while training: the cat."""

    @property
    def lora(self) -> Path:
        return self.folder / f"{NAME}.safetensors"

    @property
    def samples(self) -> Path:
        """The sheet of all samples."""
        return self.folder / "sample" / f"{NAME}_00_sheet.png"

    @property
    def loss(self) -> Path:
        """The charts of `--loss_report`."""
        return self.folder / f"{NAME}_loss.png"


def write_disc(folder: Path, material: Material) -> Disc:
    """Writes controls, targets, captions, the data set file and the prompt file into `folder` (made if need be)."""
    targets, controls = folder / "targets", folder / "controls"
    for new in (targets, controls):
        new.mkdir(parents=True, exist_ok=True)
    disc = ImageOps.fit(Image.open(material.astronaut_mask).convert("RGB"), (SIZE, SIZE))
    for source in (material.astronaut, material.coffee):
        for number, picture in enumerate(_crops(source)):
            stem = f"{source.stem}_{number}"
            picture.save(controls / f"{stem}.png")
            disc.save(targets / f"{stem}.png")
            (targets / f"{stem}.txt").write_text(CAPTION, encoding="utf-8")
    paths = {"targets": targets, "controls": controls, "cache": folder / "cache"}
    text = CONFIG.format(size=SIZE, **{name: quoted(path) for name, path in paths.items()})
    config, prompts = folder / "data.toml", folder / "prompts.txt"
    config.write_text(text, encoding="utf-8")
    cat = material.chelsea
    size = f"--w {SIZE} --h {SIZE} --s {SAMPLE_STEPS} --d 1"
    prompts.write_text(f"{CAPTION} --i {cat} --ci {cat} --of {OPTIONS} {size}\n", encoding="utf-8")
    return Disc(folder=folder, config=config, prompts=prompts)


def _crops(source: Path) -> list[Image.Image]:
    """Squares from seeded places."""
    photograph, random = Image.open(source).convert("RGB"), np.random.default_rng(0)
    crops = []
    for share in random.uniform(0.5, 0.9, NUM_CROPS):
        side = int(min(photograph.size) * share)
        left, top = (int(random.integers(0, length - side + 1)) for length in photograph.size)
        crops.append(photograph.crop((left, top, left + side, top + side)).resize((SIZE, SIZE)))
    return crops


def training_commands(models: ModelPaths, disc: Disc) -> list[list[str]]:
    """What a user writes behind `python`: latents, texts, training."""
    data = ["--dataset_config", str(disc.config), "--device", "cpu"]
    image_models = ["--vae", str(models.vae), "--image_encoder", str(models.image_encoder)]
    text_models = ["--text_encoder1", str(models.text_encoder1), "--text_encoder2", str(models.text_encoder2)]
    one_frame = ["--one_frame", "--one_frame_no_2x", "--one_frame_no_4x"]
    network = ["--network_module", "networks.lora_framepack", "--network_dim", "16", "--network_alpha", "16"]
    schedule = ["--learning_rate", "4e-3", "--lr_scheduler", "cosine", "--max_train_steps", str(NUM_STEPS)]
    samples = ["--sample_prompts", str(disc.prompts), "--sample_at_first"]
    samples += ["--sample_every_n_steps", str(SAMPLE_EVERY), "--one_frame"]
    output = ["--output_dir", str(disc.folder), "--output_name", NAME, "--seed", "1", "--loss_report"]
    training = [*network, *schedule, *samples, *output, "--guidance_scale", "10", "--max_data_loader_n_workers", "0"]
    return [
        ["fpack_cache_latents.py", *data, *image_models, *one_frame, "--num_workers", "0"],
        ["fpack_cache_text_encoder_outputs.py", *data, *text_models, "--num_workers", "0"],
        ["fpack_train_network.py", "--dit", str(models.dit), *data, *image_models, *text_models, *training],
    ]
