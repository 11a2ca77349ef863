"""The flags of `lora_post_hoc_ema.py`."""

from dataclasses import dataclass

from options.flag_fields import flag


@dataclass(frozen=True, kw_only=True)
class PostHocEmaFlags:
    """Which files are averaged, and how much the later ones count."""

    path: tuple[str, ...] = flag("LoRA files of one training, two or more", required=True, positional=True)
    output_file: str = flag("file to write, .safetensors", required=True)
    no_sort: bool = flag("take the files in the given order, not in that of their modification times", default=False)
    beta: float = flag("what is kept of the average when the next file comes in", default=0.95)
    beta2: float | None = flag("the same for the last file; --beta changes to it in equal steps (default: --beta)")
    sigma_rel: float | None = flag(
        "width of the average in relation to the length of the training, 0.001 to 0.2886; replaces --beta and --beta2"
    )
