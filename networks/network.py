"""A network: the adapters of one transformer, which are trained, saved, applied and taken off together."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from networks.adapter import Adapter, attach, can_attach, detach
from networks.arguments import Dropout
from networks.lora_metadata import write_lora
from networks.module_names import native_name
from networks.targets import adaptable_layers
from options.errors import UserError, did_you_mean

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class NormReport:
    """What limiting the norms of all weight differences did."""

    num_scaled: int = 0
    mean: float = 0.0
    """Of the norms afterwards."""
    max: float = 0.0


class Network(nn.Module):
    """Adapters under the names of native files: the state dict is what a file holds. The transformer is no part of it.

    Args:
        adapters: by the dotted path of their layer.
        loraplus_lr_ratio: see `parameter_groups`.
    """

    def __init__(self, adapters: Mapping[str, Adapter], *, loraplus_lr_ratio: float | None = None) -> None:
        super().__init__()
        self.paths = {native_name(path): path for path in adapters}
        """Name in files → dotted path of the layer."""
        if len(self.paths) != len(adapters):
            raise ValueError("two layers whose paths differ in dots and underscores only would share a name in files")
        for path, adapter in adapters.items():
            self.add_module(native_name(path), adapter)
        self.loraplus_lr_ratio = loraplus_lr_ratio
        self._multiplier = 1.0
        self._adapted: list[tuple[nn.Module, Adapter]] = []
        self._has_warned_of_norms = False

    @property
    def adapters(self) -> dict[str, Adapter]:
        """By the dotted path of their layer."""
        return {path: self.get_submodule(name) for name, path in self.paths.items()}

    @property
    def kinds(self) -> str:
        """`LoRA`, or several when a file had several."""
        return " and ".join(dict.fromkeys(adapter.kind for adapter in self.adapters.values()))

    @property
    def has_dropout(self) -> bool:
        return any(adapter.dropout != Dropout() for adapter in self.adapters.values())

    @property
    def multiplier(self) -> float:
        """How strong the network is; it can be changed at any time, and 0 switches it off."""
        return self._multiplier

    @multiplier.setter
    def multiplier(self, value: float) -> None:
        self._multiplier = float(value)
        for adapter in self.adapters.values():
            adapter.multiplier = self._multiplier

    def compute_in(self, dtype: torch.dtype | None) -> None:
        """Lets the adapters compute in half precision while their parameters stay float32: mixed precision.

        Args:
            dtype: float16 or bfloat16; None computes in the parameters' type.
        """
        for adapter in self.adapters.values():
            adapter.compute_dtype = dtype

    def apply_to(self, transformer: nn.Module) -> None:
        """Makes the layers of `transformer` add what the adapters give, until `remove`.

        The adapters stay on their device. Several networks may be applied to one transformer.

        Raises:
            RuntimeError: it is applied already, or something else has replaced a layer's `forward`.
            ValueError: the transformer lacks a layer.
        """
        if self._adapted:
            raise RuntimeError("the network is applied already")
        layers = adaptable_layers(transformer)
        if missing := [path for path in self.adapters if path not in layers]:
            raise ValueError(f"the transformer has no layer {missing[0]} ({len(missing)} missing)")
        if closed := [path for path in self.adapters if not can_attach(layers[path])]:
            raise RuntimeError(f"the forward of {closed[0]} has been replaced, which would hide its adapter")
        self._adapted = [(layers[path], adapter) for path, adapter in self.adapters.items()]
        for layer, adapter in self._adapted:
            attach(layer, adapter)

    def remove(self) -> None:
        """Leaves the transformer as it was before `apply_to`; does nothing when not applied."""
        # An interrupt in here or in `apply_to` may leave a part: what is not attached is passed over.
        for layer, adapter in self._adapted:
            detach(layer, adapter)
        self._adapted = []

    def parameter_groups(self, lr: float | None, loraplus_lr_ratio: float | None = None) -> list[dict[str, object]]:
        """Groups for an optimizer: `params`, `lr` and the `name` they are logged by; none for an lr of 0 or None.

        Args:
            loraplus_lr_ratio: LoRA+: `lora_up` forms a group of its own with lr times this; None takes the one in
                `--network_args`. Source: Hayou et al., "LoRA+: Efficient Low Rank Adaptation of Large Models", 2024.
        """
        ratio = loraplus_lr_ratio or self.loraplus_lr_ratio
        parameters = dict(self.named_parameters())
        ups = [parameter for name, parameter in parameters.items() if "lora_up" in name] if ratio else []
        others = [parameter for name, parameter in parameters.items() if not (ratio and "lora_up" in name)]
        if ratio and not ups:
            logger.warning("loraplus_lr_ratio has no effect: %s has no up-projections", self.kinds)
        if not lr:
            return []
        groups = [{"params": others, "lr": lr, "name": "unet"}]
        return groups + ([{"params": ups, "lr": lr * ratio, "name": "unet plus"}] if ups else [])

    @torch.no_grad()
    def scale_weight_norms(self, limit: float) -> NormReport:
        """Shrinks every weight difference whose Frobenius norm exceeds `limit`, at multiplier 1. LoRA only.

        Raises:
            UserError: the limit is not above 0.
        """
        if not limit > 0:
            raise UserError("--scale_weight_norms", limit, "a number above 0", "change it, or leave the option out")
        norms = [(adapter, adapter.squared_norm()) for adapter in self.adapters.values()]
        norms = [(adapter, squared.sqrt()) for adapter, squared in norms if squared is not None]
        if not norms:
            if not self._has_warned_of_norms:
                logger.warning("--scale_weight_norms has no effect on %s", self.kinds)
            self._has_warned_of_norms = True
            return NormReport()
        ratios = []
        for adapter, norm in norms:
            bounded = norm.clamp(min=limit / 2)
            ratios.append(bounded.clamp(max=limit) / bounded)
            adapter.shrink(ratios[-1])
        ratio = torch.stack(ratios)
        after = torch.stack([norm for _, norm in norms]) * ratio
        num_scaled, mean, largest = torch.stack([(ratio != 1).sum(), after.mean(), after.max()]).tolist()
        return NormReport(num_scaled=int(num_scaled), mean=mean, max=largest)

    def load_tensors(self, tensors: Mapping[str, Tensor], *, where: str) -> None:
        """Takes over the tensors of a native file, strictly. A missing alpha means the rank, as everywhere.

        The file's alpha replaces the network's: its tensors would mean something else with another one.

        Args:
            where: the flag and the file, for messages.

        Raises:
            UserError: a tensor is missing, unexpected or of another shape; the first offender is named.
        """
        own, tensors = self.state_dict(), dict(tensors)
        alphas = {f"{native_name(path)}.alpha": adapter for path, adapter in self.adapters.items()}
        for key, adapter in alphas.items():
            tensors.setdefault(key, torch.tensor(float(adapter.rank or adapter.alpha)))
        _check_keys(own, tensors, where)
        before = [adapter.scale for adapter in alphas.values()]
        self.load_state_dict({key: tensor.reshape(own[key].shape) for key, tensor in tensors.items()})
        if num_changed := sum(a.scale != scale for a, scale in zip(alphas.values(), before, strict=True)):
            logger.info("%s: its alphas replace the network's in %d layers", where, num_changed)

    def save(self, path: str | Path, *, dtype: torch.dtype = torch.float32, metadata: Mapping[str, str]) -> None:
        """Writes a native file, all tensors (alphas too) in `dtype`. The same network gives the same bytes."""
        tensors = {key: tensor.detach().to("cpu", dtype) for key, tensor in self.state_dict().items()}
        write_lora(path, tensors, metadata)


def _check_keys(own: Mapping[str, Tensor], given: Mapping[str, Tensor], where: str) -> None:
    missing = [key for key in own if key not in given]
    if unexpected := [key for key in given if key not in own]:
        remedy = did_you_mean(unexpected[0], missing[:1000], "create the network as it was when the file was trained")
        got = f"{unexpected[0]}, which the network does not have ({len(unexpected)} such)"
        raise UserError(where, got, f"the {len(own)} tensors of the network only", remedy)
    if missing:
        got, expected = f"no {missing[0]} ({len(missing)} missing)", f"all {len(own)} tensors of the network"
        raise UserError(where, got, expected, "create the network as it was when the file was trained")
    for key, tensor in own.items():
        if given[key].shape != tensor.shape and not given[key].numel() == tensor.numel() == 1:
            got, expected = f"{key} of shape {tuple(given[key].shape)}", f"{tuple(tensor.shape)}"
            raise UserError(where, got, expected, "use the --network_dim of the file, or another file")
