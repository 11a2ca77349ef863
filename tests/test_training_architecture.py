"""Both model families are what the trainer asks for. Nothing else checks that: neither imports the protocol."""

import inspect
from dataclasses import fields

import pytest

from frame_pack.architecture import FramePackArchitecture
from training.architecture import Architecture
from wan.architecture import WanArchitecture

FAMILIES = pytest.mark.parametrize("family", [FramePackArchitecture, WanArchitecture])
METHODS = {name: member for name, member in vars(Architecture).items() if name[0] != "_" and inspect.isfunction(member)}
PROPERTIES = [name for name, member in vars(Architecture).items() if isinstance(member, property)]


@FAMILIES
def test_a_family_has_every_attribute(family: type) -> None:
    known = {field.name for field in fields(family)} | set(dir(family))
    assert {*Architecture.__annotations__, *PROPERTIES, *METHODS} <= known
    assert {"rules", "checkpoint", "settings", "sample_defaults", "loss_weights", "training_plan"} <= known


@FAMILIES
@pytest.mark.parametrize("name", METHODS)
def test_a_family_takes_what_it_is_given(family: type, name: str) -> None:
    def given(function) -> list[tuple[str, object]]:
        return [(parameter.name, parameter.kind) for parameter in inspect.signature(function).parameters.values()]

    assert given(getattr(family, name)) == given(METHODS[name])


def test_families_have_names_of_their_own() -> None:
    names = [(family.version, family.model_name, family.scripts) for family in (FramePackArchitecture, WanArchitecture)]
    assert [name[:2] for name in names] == [("framepack", "framepack"), ("wan", "wan2.1")]
    assert names[1][2].latents == "wan_cache_latents.py" and names[1][2].texts == "wan_cache_text_encoder_outputs.py"
