"""The flags of `fpack_train_network.py`."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from options.errors import UserError
from options.flag_fields import flag
from options.flags_fpack_generate import FramePackModelFlags
from options.flags_generate import VaeMemoryFlags, check_vae_memory
from options.flags_train import TrainFlags
from options.train_checks import check_train, complaint, missing_models

logger = logging.getLogger(__name__)

NETWORK_MODULE = "networks.lora_framepack"
SAMPLE_MODELS = ("vae", "text_encoder1", "text_encoder2", "image_encoder")


@dataclass(frozen=True, kw_only=True)
class FramePackSampleFlags(VaeMemoryFlags):
    """How samples are generated; the training itself goes by what is cached."""

    f1: bool = flag("samples with FramePack-F1, forwards", default=False)
    one_frame: bool = flag("one-frame samples", default=False)
    latent_window_size: int = flag("latent frames per section of a sample; as in caching", default=9)
    bulk_decode: bool = flag("decode a sample in one piece", default=False)
    vae_dtype: Literal["float16"] | None = flag("leave it out: it is float16 on a GPU, float32 on a CPU")
    fp8_llm: bool = flag("LLaMA in fp8 with scales", default=False)


@dataclass(frozen=True, kw_only=True)
class FramePackTrainFlags(TrainFlags):
    """All of them."""

    models: FramePackModelFlags
    framepack: FramePackSampleFlags


def check_framepack_train(flags: FramePackTrainFlags) -> None:
    """Refuses what can be known to be wrong before anything is opened, and logs what has no effect.

    Raises:
        UserError: one line for each thing that is wrong.
    """
    check_train(flags, dit=flags.models.dit, network_module=NETWORK_MODULE, more=_problems(flags))
    if flags.framepack.f1 and flags.framepack.one_frame:
        logger.warning("--one_frame is not expected to work with --f1: FramePack-F1 was not trained for it")


def _problems(flags: FramePackTrainFlags) -> Iterator[UserError]:
    yield from missing_models(flags, flags.models, SAMPLE_MODELS)
    yield from complaint(check_vae_memory, flags.framepack)
    if flags.framepack.latent_window_size < 1:
        yield UserError("--latent_window_size", flags.framepack.latent_window_size, "1 or more", "leave it out for 9")
