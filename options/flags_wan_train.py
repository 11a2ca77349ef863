"""The flags of `wan_train_network.py`."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from options.errors import UserError
from options.flag_fields import flag
from options.flags_train import TrainFlags
from options.flags_wan_generate import Wan22PairFlags, WanModelFlags
from options.train_checks import check_train, missing_models
from options.wan_tasks import DEFAULT_TASK, FLAG, WanTask

logger = logging.getLogger(__name__)

NETWORK_MODULE = "networks.lora_wan"


@dataclass(frozen=True, kw_only=True)
class WanSampleFlags:
    """What is trained, and how samples are generated."""

    task: WanTask = flag("which transformer --dit is", default=DEFAULT_TASK)
    one_frame: bool = flag("one-frame samples; each prompt says where its picture stands, by --of", default=False)
    one_frame_target_loss_only: bool = flag(
        "one frame: the loss looks at the picture alone, not at the control images, which are denoised with it",
        default=False,
    )
    vae_dtype: Literal["bfloat16", "bf16", "float16", "fp16", "float32", "fp32"] | None = flag(
        "compute type of the VAE (default: bfloat16 on a GPU, float32 on a CPU)"
    )
    vae_cache_cpu: bool = flag("keep in RAM what the VAE remembers of earlier frames", default=False)
    fp8_t5: bool = flag("UMT5 in fp8 with scales", default=False)


@dataclass(frozen=True, kw_only=True)
class WanTrainFlags(TrainFlags):
    """All of them."""

    models: WanModelFlags
    wan: WanSampleFlags
    wan22: Wan22PairFlags


def check_wan_train(flags: WanTrainFlags) -> None:
    """Refuses what can be known to be wrong before anything is opened, and logs what has no effect.

    Raises:
        UserError: one line for each thing that is wrong.
    """
    dit = flags.models.dit or flags.models.ckpt_dir
    check_train(flags, dit=dit, network_module=NETWORK_MODULE, more=_problems(flags))
    if flags.run.guidance_scale != 1:
        logger.warning("--guidance_scale has no effect: Wan has no distilled guidance")


def _problems(flags: WanTrainFlags) -> Iterator[UserError]:
    wan = flags.wan
    encoders = ("vae", "t5", "clip") if wan.task.takes_image else ("vae", "t5")
    if flags.models.ckpt_dir is None:
        yield from missing_models(flags, flags.models, encoders)
    for name in ("one_frame", "one_frame_target_loss_only"):
        if getattr(wan, name) and wan.task.kind not in ("i2v", "flf2v"):
            got, remedy = f"{FLAG} {wan.task.name}", f"use {FLAG} i2v-14B or flf2v-14B, and a transformer for it"
            yield UserError(f"--{name}", got, "an image-to-video task", remedy)
