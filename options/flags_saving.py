"""Flags about what a training run leaves: LoRA files, states, logs, uploads, and what the files say of themselves."""

import re
from dataclasses import dataclass
from typing import Literal

from options.errors import UserError
from options.flag_fields import flag

AUTO = "auto"
"""`--resume auto`: go on from the newest state, if there is one."""
MAX_NAME_BYTES = 200
"""Of 255 on most disks: `-step00000000-state.new` and the like are put behind a name."""
FORBIDDEN = '<>:"/\\|?*'
RESERVED = {"CON", "PRN", "AUX", "NUL", *(f"{port}{n}" for port in ("COM", "LPT") for n in range(1, 10))}


@dataclass(frozen=True, kw_only=True)
class SavingFlags:
    """LoRA files and states: where, when, and how many are kept."""

    output_dir: str | None = flag("folder for LoRA files and states")
    output_name: str | None = flag("name of the files, without .safetensors")
    save_precision: Literal["float", "fp32", "fp16", "bf16"] | None = flag("type of saved weights (default: float32)")
    save_every_n_epochs: int | None = flag("save every so many epochs; the last one is saved anyway")
    save_every_n_steps: int | None = flag("save every so many steps")
    save_last_n_epochs: int | None = flag("keep only so many of the files saved by epoch")
    save_last_n_epochs_state: int | None = flag("the same for states (default: as many as files)")
    save_last_n_steps: int | None = flag("of the files saved by step, keep those of the last so many steps")
    save_last_n_steps_state: int | None = flag("the same for states (default: as for files)")
    save_state: bool = flag("save a state with every file and at the end, to resume from", default=False)
    save_state_on_train_end: bool = flag("save a state at the end only", default=False)
    resume: str | None = flag("state folder to go on from, or auto: the newest one of --output_name, if there is one")
    resume_from_huggingface: bool = flag("--resume is user/repo/path[:revision[:type]] on the hub", default=False)

    @property
    def dtype_name(self) -> str:
        """torch's name of the type of saved weights."""
        return {"fp16": "float16", "bf16": "bfloat16"}.get(self.save_precision or "", "float32")


@dataclass(frozen=True, kw_only=True)
class UploadFlags:
    """Copies on the Hugging Face hub."""

    huggingface_repo_id: str | None = flag("user/repo to upload LoRA files to; it is made if need be")
    huggingface_repo_type: Literal["model", "dataset", "space"] | None = flag("kind of repository (default: model)")
    huggingface_path_in_repo: str | None = flag("folder in the repository (default: its top)")
    huggingface_token: str | None = flag("token for the hub (default: the one you are logged in with)", secret=True)
    huggingface_repo_visibility: Literal["public", "private"] | None = flag("of a new repository (default: private)")
    save_state_to_huggingface: bool = flag("upload states too", default=False)
    async_upload: bool = flag("train on while files are uploaded; the last ones are always waited for", default=False)


@dataclass(frozen=True, kw_only=True)
class TrackingFlags:
    """Loss and learning rate in TensorBoard or Weights & Biases."""

    logging_dir: str | None = flag("folder for logs; a folder for this run is made in it")
    log_with: Literal["tensorboard", "wandb", "all"] | None = flag(
        "what to log with (default: tensorboard if --logging_dir is given)"
    )
    log_prefix: str | None = flag("what the name of the run's log folder begins with, before the time")
    log_tracker_name: str | None = flag("project name (default: network_train)")
    wandb_run_name: str | None = flag("name of the run in Weights & Biases")
    log_tracker_config: str | None = flag("TOML file with arguments for [tensorboard] and [wandb], instead of ours")
    wandb_api_key: str | None = flag("key for Weights & Biases", secret=True)
    log_config: bool = flag("log the options too, without secrets and paths", default=False)

    @property
    def trackers(self) -> tuple[str, ...]:
        """What is logged with."""
        chosen = self.log_with or ("tensorboard" if self.logging_dir else None)
        return {None: (), "all": ("tensorboard", "wandb")}.get(chosen, (chosen,))


@dataclass(frozen=True, kw_only=True)
class ModelspecFlags:
    """What LoRA files say of themselves."""

    no_metadata: bool = flag("save no settings of the training in LoRA files", default=False)
    training_comment: str | None = flag("a comment to save in LoRA files")
    metadata_title: str | None = flag("title (default: --output_name)")
    metadata_author: str | None = flag("author")
    metadata_description: str | None = flag("description")
    metadata_license: str | None = flag("license")
    metadata_tags: str | None = flag("tags, separated by commas")
    metadata_reso: str | None = flag("resolution: width,height or one number for both (default: 1280x720)")
    metadata_arch: str | None = flag("architecture (default: the model's)")

    @property
    def resolution(self) -> str | None:
        """`--metadata_reso` as modelspec has it: `1280x720`.

        Raises:
            UserError: it is not one or two numbers above 0.
        """
        if self.metadata_reso is None:
            return None
        sides = [side.strip() for side in self.metadata_reso.split(",")]
        if len(sides) > 2 or not all(re.fullmatch("[1-9][0-9]{0,5}", side) for side in sides):
            raise UserError("--metadata_reso", self.metadata_reso, "width,height or one number", "write it as 1280,720")
        return f"{sides[0]}x{sides[-1]}"


@dataclass(frozen=True, kw_only=True)
class HubFolder:
    """A folder in a repository on the hub."""

    repo_id: str
    """`user/repo`."""
    path: str
    """Of the folder in the repository."""
    revision: str | None
    repo_type: str | None

    @classmethod
    def parse(cls, text: str) -> "HubFolder":
        """Reads `user/repo/path[:revision[:type]]`.

        Raises:
            UserError: it is something else.
        """
        place, *rest = text.split(":")
        parts = place.strip("/").split("/")
        if len(parts) < 3 or not all(parts) or len(rest) > 2 or not all(rest):
            expected = "user/repo/path[:revision[:type]]"
            remedy = "write it so, or leave --resume_from_huggingface out for a folder of this machine"
            raise UserError("--resume", text, expected, remedy)
        revision, repo_type = [*rest, None, None][:2]
        return cls(repo_id="/".join(parts[:2]), path="/".join(parts[2:]), revision=revision, repo_type=repo_type)


def check_saving(flags: SavingFlags) -> None:
    """Raises UserError for what would fail at the first save, or at the last."""
    if not flags.output_dir:
        raise UserError("--output_dir", "nothing", "a folder for LoRA files", "give --output_dir")
    if flags.output_name is None:
        raise UserError("--output_name", "nothing", "a name for LoRA files", "give --output_name")
    check_output_name(flags.output_name)
    for name in ("save_every_n_epochs", "save_every_n_steps", "save_last_n_epochs", "save_last_n_epochs_state"):
        _check_at_least(1, name, getattr(flags, name))
    for name in ("save_last_n_steps", "save_last_n_steps_state"):
        _check_at_least(0, name, getattr(flags, name))
    if flags.resume_from_huggingface:
        if flags.resume in (None, AUTO):
            expected = "--resume user/repo/path beside it"
            raise UserError("--resume_from_huggingface", f"--resume {flags.resume or 'left out'}", expected, "add it")
        HubFolder.parse(flags.resume)


def check_output_name(name: str) -> None:
    """Raises UserError for a name that is no plain file name on some system, so that files can be shared."""
    expected = "a plain file name"
    if not name.strip() or name != name.strip():
        raise UserError("--output_name", repr(name), f"{expected} without white space around it", "give another name")
    if bad := [char for char in name if char in FORBIDDEN or ord(char) < 32]:
        remedy = "folders belong into --output_dir" if bad[0] in "/\\" else "leave it out"
        raise UserError("--output_name", repr(name), f"{expected} without {bad[0]!r}", remedy)
    if name.split(".")[0].rstrip().upper() in RESERVED:
        raise UserError("--output_name", name, expected, "Windows keeps this name for a device: give another one")
    try:
        num_bytes = len(name.encode())
    except UnicodeEncodeError:
        raise UserError("--output_name", ascii(name), f"{expected} in valid Unicode", "give another name") from None
    if num_bytes > MAX_NAME_BYTES:
        raise UserError("--output_name", f"{num_bytes} bytes", f"at most {MAX_NAME_BYTES} in UTF-8", "shorten it")


def check_upload(flags: UploadFlags) -> None:
    """Raises UserError for a repository that cannot be one, or uploads without one."""
    if flags.huggingface_repo_id is None:
        if flags.save_state_to_huggingface or flags.async_upload:
            name = "--save_state_to_huggingface" if flags.save_state_to_huggingface else "--async_upload"
            raise UserError(name, "no repository", "--huggingface_repo_id beside it", f"add it, or leave {name} out")
    elif not re.fullmatch(r"[\w.-]+/[\w.-]+", flags.huggingface_repo_id, re.ASCII):
        raise UserError("--huggingface_repo_id", flags.huggingface_repo_id, "user/repo", "write it as on the hub")


def check_tracking(flags: TrackingFlags) -> None:
    """Raises UserError where a log would have no place, or where options about logs would do nothing."""
    if "tensorboard" in flags.trackers and not flags.logging_dir:
        raise UserError("--log_with", flags.log_with, "--logging_dir beside it", "give a folder for the logs")
    if flags.log_prefix and any(char in FORBIDDEN for char in flags.log_prefix):
        raise UserError("--log_prefix", flags.log_prefix, "part of a plain file name", 'leave out <>:"/\\|?*')
    if not flags.trackers and (flags.log_tracker_config or flags.log_config):
        name = "--log_tracker_config" if flags.log_tracker_config else "--log_config"
        raise UserError(name, "nothing to log with", "--logging_dir or --log_with beside it", "add one of them")


def check_modelspec(flags: ModelspecFlags) -> None:
    """Raises UserError for a resolution that is none."""
    _ = flags.resolution


def _check_at_least(smallest: int, name: str, value: int | None) -> None:
    if value is not None and value < smallest:
        raise UserError(f"--{name}", value, f"{smallest} or more", "change it, or leave the option out")
