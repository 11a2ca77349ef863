"""The flags of scripts that bring LoRAs into a model."""

from dataclasses import dataclass

from options.flag_fields import flag


@dataclass(frozen=True, kw_only=True)
class LoraSourceFlags:
    """LoRA files, in the order in which they are merged, and how much of each."""

    lora_weight: tuple[str, ...] = flag("LoRA, LoHa or LoKr files of any known format, in this order", default=())
    lora_multiplier: tuple[float, ...] = flag("their multipliers, by position (default: 1.0 each)", default=())
    include_patterns: tuple[str, ...] = flag(
        "by position: merge only modules whose name this regular expression is found in", default=()
    )
    exclude_patterns: tuple[str, ...] = flag("by position: leave out modules that this one is found in", default=())


@dataclass(frozen=True, kw_only=True)
class LoraFlags(LoraSourceFlags):
    """LoRA weights merged into the transformer while it loads."""

    save_merged_model: str | None = flag("write the transformer with its LoRAs, a file that loads as --dit, and exit")
    save_fp8_model: str | None = flag(
        "the same in fp8: with scales unless --fp8 is given without --fp8_scaled; needs no LoRAs"
    )
    lycoris: bool = flag("accepted: LoHa and LoKr are merged with and without it", default=False)

    @property
    def saving_flag(self) -> str | None:
        """The one that asks for a file instead of results."""
        names = ("save_fp8_model", "save_merged_model")
        return next((f"--{name}" for name in names if getattr(self, name) is not None), None)

    @property
    def saved_model(self) -> str | None:
        """Where that file goes."""
        return self.save_merged_model if self.save_fp8_model is None else self.save_fp8_model
