"""What users write: one-frame options, section syntax, sizes, and how flags become a request."""

from dataclasses import replace

import pytest

from options.errors import UserError
from options.fpack_request import FramePackRequestFlags
from options.geometry import bucket_near, check_size, sections_from_seconds
from options.one_frame import OneFrameOptions
from options.request import GenerationRequest
from options.sections import check_sections, lookup, parse_sections

KISEKAEICHI = "target_index=1,control_index=0;10,no_2x,no_4x,no_post"


def request(**changes) -> GenerationRequest:
    """A request from flags; the one control image that is asked for its size is 1000×800."""
    flags = replace(FramePackRequestFlags(prompt="a cat", image_path="cat.png"), **changes)
    return flags.resolve(image_size=lambda path, flag: (1000, 800))


# One-frame options


def test_documented_kisekaeichi_options_are_parsed():
    options = OneFrameOptions.parse(KISEKAEICHI).resolve(2)
    assert options == OneFrameOptions(target_index=1, control_indices=(0, 10), no_2x=True, no_4x=True, no_post=True)


def test_default_leaves_everything_on_and_the_target_open():
    assert OneFrameOptions.parse("default") == OneFrameOptions()


def test_spaces_around_options_are_allowed():
    spaced = " no_2x , control_index = 0 ; 1 , target_index = 9 "
    assert OneFrameOptions.parse(spaced) == OneFrameOptions.parse("no_2x,control_index=0;1,target_index=9")


def test_index_values_beyond_the_window_are_kept():
    options = OneFrameOptions.parse("target_index=40,control_index=13;0")
    assert (options.target_index, options.control_indices) == (40, (13, 0))


def test_printed_options_parse_back_to_themselves():
    for text in ("default", KISEKAEICHI, "no_post,target_index=40"):
        options = OneFrameOptions.parse(text)
        assert OneFrameOptions.parse(str(options)) == options


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no_2", "did you mean no_2x?"),
        ("targetindex=9", "did you mean target_index?"),
        ("control_indices=0;10", "here it is called control_index"),
        ("history_index=13", "here it is called control_index (the index of the reference image)"),
        ("latent_index=1", "here it is called target_index (oichi's latent_index=0 is simply left out)"),
        ("use_clean_latents_2x", "here it is called no_2x"),
        ("target_index", "expected target_index with a value"),
        ("target_index=", "got target_index=(nothing)"),
        ("target_index=-1", "an integer from 0 to 999999"),
        ("target_index=1.5", "an integer from 0 to 999999"),
        ("target_index=１", "an integer from 0 to 999999"),
        ("target_index=99999999999999999999", "an integer from 0 to 999999"),
        ("control_index=0;;1", "must be quoted"),
        ("no_2x=1", "expected no_2x with no value"),
        ("no_2x,no_2x", "no_2x twice"),
        ("target_index=1,target_index=2", "target_index twice"),
        ("", "an empty option"),
        ("no_2x,,no_4x", "an empty option"),
    ],
)
def test_malformed_one_frame_options_are_named_with_a_remedy(text, message):
    with pytest.raises(UserError) as error:
        OneFrameOptions.parse(text)
    assert message in str(error.value)
    assert str(error.value).startswith("--one_frame_inference: got ")


@pytest.mark.parametrize(("text", "num_controls"), [("control_index=0", 2), ("control_index=0;10", 1), ("default", 2)])
def test_number_of_indices_must_be_the_number_of_control_images(text, num_controls):
    with pytest.raises(UserError, match=f"{num_controls} control image.*quoted in a shell"):
        OneFrameOptions.parse(text).resolve(num_controls)


def test_a_single_control_image_stands_at_zero_by_default():
    assert OneFrameOptions.parse("default").resolve(1).control_indices == (0,)
    assert OneFrameOptions.parse("default").resolve(0).control_indices == ()


def test_unusual_index_values_give_hints_and_usual_ones_none():
    def hints(text: str) -> list[str]:
        return OneFrameOptions.parse(text).hints(window=9)

    assert "target_index=0" in hints("target_index=0")[0]
    assert "control_index 4" in hints("target_index=9,control_index=0;4")[0]
    assert not hints(KISEKAEICHI)
    assert not hints("default")


# Sections


def test_text_without_separator_is_section_zero_whatever_it_contains():
    assert parse_sections("a dog: it runs 0-2:", "--prompt") == {0: "a dog: it runs 0-2:"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0:run;;;1:catch;;;2:back", {0: "run", 1: "catch", 2: "back"}),
        ("0-2: same ;;;-1: last", {0: "same", 1: "same", 2: "same", -1: "last"}),
        ("first;;;-1:last", {0: "first", -1: "last"}),
        ("C:/絵/a.png;;;1:D:\\b.png", {0: "C:/絵/a.png", 1: "D:\\b.png"}),
        ("2:b;;;1:a", {2: "b", 1: "a", 0: "a"}),
        ("-1:b;;;-2:a", {-1: "b", -2: "a", 0: "a"}),
        ("http://a;;;1:b", {0: "http://a", 1: "b"}),
    ],
)
def test_section_syntax(text, expected):
    assert parse_sections(text, "--prompt") == expected


@pytest.mark.parametrize("text", ["2-0:a;;;b", "-2-1:a;;;b", "1:a;;;1:b", "a;;;b"])
def test_contradictory_sections_are_errors(text):
    with pytest.raises(UserError):
        parse_sections(text, "--prompt")


def test_sections_that_the_video_does_not_have_are_errors():
    check_sections({0: "", 2: "", -3: ""}, 3, "--prompt")
    for index in (3, -4):
        with pytest.raises(UserError, match=f"section {index}"):
            check_sections({index: ""}, 3, "--prompt")


def test_a_section_is_looked_up_from_the_end_then_from_the_start_then_as_zero():
    sections = {0: "zero", 1: "one", -1: "last", 2: "two"}
    assert [lookup(sections, i, 3) for i in range(3)] == ["zero", "one", "last"]
    assert lookup({0: "zero"}, 2, 3) == "zero"


# Sizes and counts


def test_bucket_helper_gives_the_reference_vectors():
    assert bucket_near((1000, 800), (640, 640)) == (704, 576)
    assert bucket_near((512, 768), (832, 480)) == (512, 768)


@pytest.mark.parametrize("size", [(256, 250), (8, 256), (0, 256), (-16, 256), (264, 256)])
def test_sizes_must_be_positive_multiples_of_sixteen(size):
    with pytest.raises(UserError, match="multiples of 16, at most 16384; use "):
        check_size(*size)


def test_seconds_become_sections_at_thirty_frames_per_second():
    assert [sections_from_seconds(s, 9) for s in (0.1, 1.2, 1.81, 5)] == [1, 1, 2, 4]
    assert request(video_seconds=5.0, fps=16).num_sections == 4
    assert request(video_seconds=5.0, video_sections=8).num_sections == 8


# Requests


def test_masks_and_indices_follow_the_order_of_the_control_images():
    resolved = request(
        one_frame_inference="target_index=1,control_index=10;0",
        control_image_path=("ref.png", "start.png"),
        control_image_mask_path=("m1.png", "m2.png"),
    )
    assert resolved.control_image_paths == ("ref.png", "start.png")
    assert resolved.control_mask_paths == ("m1.png", "m2.png")
    assert resolved.one_frame.control_indices == (10, 0)
    assert resolved.num_sections == 1


def test_image_mask_is_the_first_controls_mask_unless_one_is_given():
    one_frame = {"one_frame_inference": "default", "control_image_path": ("a.png",), "image_mask_path": "m.png"}
    assert request(**one_frame).control_mask_paths == ("m.png",)
    assert request(**one_frame, control_image_mask_path=("c.png",)).control_mask_paths == ("c.png",)
    assert request(image_mask_path="m.png").image_mask_path == "m.png"


def test_auto_resize_takes_the_ratio_of_the_first_control_image():
    flags = {"one_frame_inference": "default", "control_image_path": ("a.png",), "video_size": (640, 640)}
    resized = request(**flags, one_frame_auto_resize=True)
    assert (resized.width, resized.height) == (704, 576)
    assert request(**flags).width == 640


def test_a_comma_list_of_images_is_a_list_of_controls_unless_a_file_has_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = {"one_frame_inference": "control_index=0;10", "image_path": "bg.png, char.png"}
    assert request(**flags).control_image_paths == ("bg.png", "char.png")
    assert request(**flags).image_paths == {0: "bg.png"}
    (tmp_path / "bg.png, char.png").touch()
    flags["one_frame_inference"] = "default"
    assert request(**flags).image_paths == {0: "bg.png, char.png"}
    assert request(**flags).control_image_paths == ()


def test_an_unset_seed_differs_from_call_to_call():
    assert len({request().seed for _ in range(4)}) == 4
    assert request(seed=7).seed == 7


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": None}, "--prompt: got nothing"),
        ({"video_size": (250, 256)}, "--video_size: got 250 256"),
        ({"infer_steps": 0}, "--infer_steps: got 0"),
        ({"video_seconds": -1.0}, "--video_seconds: got -1.0"),
        ({"video_seconds": float("nan")}, "--video_seconds: got nan"),
        ({"video_sections": 0}, "--video_sections: got 0"),
        ({"prompt": "caf\udce9"}, "--prompt: got caf\\udce9; expected a text in UTF-8"),
        ({"video_size": (32768, 256)}, "at most 16384"),
        ({"fps": 4_000_000_000}, "--fps: got 4000000000; expected an integer from 1 to 1000"),
        ({"flow_shift": 1e-300}, "--flow_shift: got 1e-300"),
        ({"embedded_cfg_scale": 1e38}, "--embedded_cfg_scale: got 1e+38"),
        ({"latent_paddings": "1000000000"}, "--latent_paddings: got 1000000000"),
        ({"image_path": "0:a;;;1:b;;;"}, "an empty piece"),
        ({"latent_window_size": 0}, "--latent_window_size: got 0"),
        ({"flow_shift": 0.0}, "--flow_shift: got 0.0"),
        ({"rope_scaling_factor": 0.0}, "--rope_scaling_factor: got 0.0"),
        ({"guidance_rescale": 1.5}, "--guidance_rescale: got 1.5"),
        ({"seed": -1}, "--seed: got -1"),
        ({"fps": 0}, "--fps: got 0"),
        ({"latent_paddings": "3,x"}, "--latent_paddings: got 3,x"),
        ({"latent_paddings": "1,-1"}, "--latent_paddings: got 1,-1"),
        ({"prompt": "0:a;;;5:b", "video_sections": 3}, "--prompt: got section 5"),
        ({"image_path": "0:a;;;-4:b", "video_sections": 3}, "--image_path: got section -4"),
        ({"prompt": "0:a;;;1:b", "one_frame_inference": "default"}, "--prompt: got section 1"),
        ({"control_image_path": ("a",)}, "add --one_frame_inference default"),
        ({"control_image_mask_path": ("a",)}, "add --one_frame_inference default"),
        ({"one_frame_auto_resize": True}, "add --one_frame_inference default"),
        ({"image_mask_path": "m", "image_path": None}, "--image_mask_path: got m"),
        ({"one_frame_inference": "default", "image_mask_path": "m"}, "1 masks for 0 control images"),
        (
            {
                "one_frame_inference": "default",
                "control_image_path": ("a",),
                "control_image_mask_path": ("m", "n"),
            },
            "2 masks for 1 control images",
        ),
    ],
)
def test_values_that_cannot_work_are_refused_at_the_door(changes, message):
    with pytest.raises(UserError) as error:
        request(**changes)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_path": None}, "starts from grey"),
        ({"one_frame_inference": "default", "f1": True}, "not expected to work with --f1"),
        ({"end_image_path": "e", "f1": True}, "--end_image_path is ignored"),
        ({"latent_paddings": "0,0", "one_frame_inference": "default"}, "--latent_paddings is ignored"),
        ({"one_frame_inference": "default"}, "no --control_image_path"),
        ({"one_frame_inference": "default", "image_path": None}, "SigLIP sees black"),
    ],
)
def test_options_without_effect_are_mentioned(changes, message):
    assert any(message in remark for remark in request(**changes).remarks())


def test_a_usual_request_is_not_remarked_upon():
    assert request().remarks() == []
    assert request(one_frame_inference=KISEKAEICHI, control_image_path=("a", "b")).remarks() == []
