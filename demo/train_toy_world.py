"""Trains the small models of the toy world from nothing: `python -m demo.train_toy_world --output FOLDER`.

They are in the repository already, in `demo/toy/models`, with what this printed when they were made. The training can
be stopped at any time and goes on when it is called again; `--steps` makes pieces of it. Order of events:

    encoders   random, frozen
    VAE        single pictures first, then also clips
    pool       scenes as latents and states, in POOL.safetensors
    DiT        sections of clips, single frames, kisekaeichi
    card       seeds, steps, losses and versions beside the weights
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import sys
from pathlib import Path

import torch

from common.device import pick_device
from common.files import atomic_folder
from demo.encoders import ModelPaths, save_encoders, stored_as
from demo.toy import dit, vae
from demo.toy.pool import CLIPS_SEED, NUM_CLIPS, NUM_STILLS, STILLS_SEED, load_pool
from demo.toy.world import captions

ENCODER_SEED = 3
STAGES = ("vae", "dit")
TITLES = {"vae": "VAE", "dit": "transformer", "polish": "then, from their average"}
CARD_NAME = "README.md"
CARD = """\
# Models of the toy world

One shape moves on a background: see `demo/toy/world.py`. These models were made by `python -m demo.train_toy_world`;
they have FramePack's architecture and file layout and know nothing but this world.

| | |
|---|---|
{rows}

Losses are means over the last 100 steps. `training.json` has them for every 100 steps. From step 2000 on the
transformer's loss looks at shapes above all, so it is larger than before. There is no model for FramePack-F1.
`exams.txt` is what `python -m demo.toy.exams` measured on held-out scenes.
"""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m demo.train_toy_world")
    parser.add_argument("--output", type=Path, required=True, help="folder for states and models")
    parser.add_argument("--steps", type=int, help="stop when the stage at hand has done this many steps in all")
    parser.add_argument("--stage", choices=STAGES, default=STAGES[-1], help="the last stage (default: %(default)s)")
    parser.add_argument("--device", help="of the trainings (default: a GPU if there is one)")
    options = parser.parse_args(argv)
    models, device = ModelPaths.under(options.output / "models"), pick_device(options.device)
    if (options.output / "models" / CARD_NAME).is_file():
        print(f"{options.output}: all models are there")
        return 0
    # Written last, so where it is, the encoders are.
    if not (models.image_encoder / "feature_extractor" / "preprocessor_config.json").is_file():
        save_encoders(options.output / "models", dit.SIZES, seed=ENCODER_SEED, corpus=corpus())
    if not train_vae(models, options.output, options.steps, device) or options.stage == "vae":
        return 0
    if train_dit(models, options.output, options.steps, device):
        write_card(options.output)
    return 0


def corpus() -> list[str]:
    """What the tokenizers learn from: captions, so often that each of their words becomes a token."""
    return [*captions(), *captions()]


def train_vae(models: ModelPaths, folder: Path, stop_at: int | None, device: torch.device) -> bool:
    """Whether the VAE is there now."""
    target = models.vae / "vae"
    if target.is_dir():
        return True
    model = vae.train_vae(folder, device=device, stop_at=stop_at)
    if model is not None:
        with atomic_folder(target) as new:
            stored_as(torch.bfloat16, model).save_pretrained(new)
    return model is not None


def train_dit(models: ModelPaths, folder: Path, stop_at: int | None, device: torch.device) -> bool:
    """Whether the transformer is there now. A part of a training leaves what it has so far."""
    untrained = folder / "untrained"
    if not untrained.is_dir():
        with atomic_folder(untrained) as new:
            dit.write_untrained(new)
    pool = load_pool(folder / "pool.safetensors", models)
    model, done = dit.train_dit(untrained, pool, folder, device=device, stop_at=stop_at)
    published = dit.empty_dit()
    published.load_state_dict({name: tensor.cpu() for name, tensor in model.state_dict().items()})
    with atomic_folder(models.dit) as new:
        stored_as(torch.bfloat16, published).save_pretrained(new)
    return done


def write_card(folder: Path) -> None:
    """Writes README.md and training.json into the models' folder."""
    plans = {plan.name: plan for plan in (vae.PLAN, dit.PLAN, dit.POLISH)}
    losses = {name: _losses(folder / f"{name}.losses.jsonl") for name in plans}
    facts = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "torch": torch.__version__,
        "platform": f"{platform.system()} {platform.machine()}",
        "seeds": {
            "encoders": ENCODER_SEED, "vae": vae.SEED, "dit": dit.SEED, "stills": STILLS_SEED, "clips": CLIPS_SEED,
        },
        "scenes": {"stills": NUM_STILLS, "clips": NUM_CLIPS},
        "trainings": {
            name: {"steps": plan.steps, "learning_rate": plan.learning_rate, "losses": losses[name]}
            for name, plan in plans.items()
        },
    }  # fmt: skip
    target = folder / "models"
    text = json.dumps(facts, indent=1, ensure_ascii=False) + "\n"
    (target / "training.json").write_text(text, encoding="utf-8", newline="\n")
    rows = [
        ("made on", f"{facts['date']}, torch {facts['torch']}, {facts['platform']}"),
        *((TITLES[name], f"{plan.steps} steps, loss {losses[name][-1]['loss']:.4f}") for name, plan in plans.items()),
        ("seeds", ", ".join(f"{name} {seed}" for name, seed in facts["seeds"].items())),
        ("trained on", f"{NUM_STILLS} scenes as single frames, {NUM_CLIPS} as clips"),
        ("encoders", "LLaMA, CLIP, SigLIP: random weights, frozen"),
    ]
    card = CARD.format(rows="\n".join(f"| {name} | {value} |" for name, value in rows))
    (target / CARD_NAME).write_text(card, encoding="utf-8", newline="\n")


def _losses(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    sys.exit(main())
