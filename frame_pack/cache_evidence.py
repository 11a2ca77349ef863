"""What the tensors of a FramePack cache tell about its settings: all that is known of the incumbent's files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from frame_pack.context import NUM_2X, NUM_POST

if TYPE_CHECKING:
    from torch import Tensor


def settings_shown(contents: frozenset[str], indices: Mapping[str, Tensor], *, num_controls: int) -> dict[str, str]:
    """The settings, named as in fingerprints, that names and indices give away.

    Args:
        contents: what the file holds.
        indices: the contents that end with `_indices`, (F,) each.
        num_controls: that the data set says there are; how many clean frames are more is the post frame.
    """
    target = indices["latent_indices"].tolist()
    clean = indices["clean_latent_indices"].tolist()
    if "latents_clean_2x" in contents:
        # Generating backwards, the second clean frame lies behind the target; F1's lies before it.
        mode = "f1" if clean[-1] < target[0] else "sections"
        return {"mode": mode, "window": str(len(target))}
    far_2x, far_4x = indices.get("clean_latent_2x_indices"), indices.get("clean_latent_4x_indices")
    has_post = len(clean) > num_controls
    controls = clean[:-NUM_POST] if has_post else clean
    shown = {
        "mode": "one_frame",
        "target_index": ";".join(map(str, target)),
        "no_post": "no" if has_post else "yes",
        "control_indices": ";".join(map(str, controls)),
        "no_2x": "yes" if far_2x is None else "no",
        "no_4x": "yes" if far_4x is None else "no",
    }
    # Post and histories stand right behind the window: n + 1, then the 2x, then the 4x group.
    ends = [clean[-1] - 1] if has_post else []
    ends += [int(far_2x[0]) - 1 - NUM_POST] if far_2x is not None else []
    ends += [int(far_4x[0]) - 1 - NUM_POST - NUM_2X] if far_4x is not None else []
    return shown | ({"window": str(ends[0])} if ends else {})
