"""The command line: types, names that users know, and one line for whatever is wrong."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import pytest

from common.flags import parse, run_script
from options.errors import UserError
from options.flag_fields import flag, later
from options.flags_convert_lora import ConvertLoraFlags
from options.flags_fpack_generate import FramePackGenerateFlags

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(path.name for path in ROOT.glob("*.py") if path.name != "quickstart.py")
INCUMBENT_FLAGS = """
sample_solver dit disable_numpy_memmap vae text_encoder1 text_encoder2 image_encoder f1 lora_weight lora_multiplier
include_patterns exclude_patterns save_merged_model prompt negative_prompt custom_system_prompt video_size video_seconds
video_sections one_frame_inference one_frame_auto_resize control_image_path control_image_mask_path fps infer_steps
save_path seed latent_window_size embedded_cfg_scale guidance_scale guidance_rescale image_path end_image_path
latent_paddings flow_shift fp8 fp8_scaled rope_scaling_factor rope_scaling_timestep_threshold fp8_llm device attn_mode
vae_tiling vae_chunk_size vae_spatial_tile_sample_min_size bulk_decode blocks_to_swap use_pinned_memory_for_block_swap
output_type no_metadata latent_path lycoris compile compile_backend compile_mode compile_dynamic compile_fullgraph
compile_cache_size_limit magcache_mag_ratios magcache_retention_ratio magcache_threshold magcache_k
magcache_calibration from_file interactive
""".split()


def generate_flags(*argv: str) -> FramePackGenerateFlags:
    return parse(FramePackGenerateFlags, description="", argv=["--save_path", "out", *argv])


def test_a_users_command_line_is_understood():
    flags = generate_flags(
        *("--video_size", "512", "768", "--prompt", "草の上を猫が歩く", "--control_image_path", "a b.png", "c.png"),
        *("--one_frame_inference", "no_2x", "--seed", "1234", "--flow_shift", "2.5", "--attn_mode", "sdpa", "--f1"),
    )
    assert flags.request.video_size == (512, 768)
    assert flags.request.prompt == "草の上を猫が歩く"
    assert flags.request.control_image_path == ("a b.png", "c.png")
    assert (flags.request.seed, flags.request.flow_shift, flags.request.f1) == (1234, 2.5, True)
    assert flags.output.save_path == "out"


def test_defaults_are_the_incumbents():
    flags = generate_flags()
    request = flags.request
    assert (request.video_size, request.video_seconds, request.infer_steps, request.fps) == ((256, 256), 5.0, 25, 30)
    assert (request.latent_window_size, request.embedded_cfg_scale, request.guidance_scale) == (9, 10.0, 1.0)
    assert (request.rope_scaling_factor, flags.compute.attn_mode) == (0.5, "torch")
    assert flags.output.saves_video and not (flags.output.saves_latents or flags.output.saves_pictures)


def test_unambiguous_abbreviations_are_accepted():
    assert generate_flags("--negative", "blurry").request.negative_prompt == "blurry"


def test_values_may_begin_with_a_minus_and_a_digit():
    """Sections counted from the end do: `--image_path "-1:last.png;;;0:first.png"`."""
    assert generate_flags("--image_path", "-1:b.png;;;0:a.png").request.image_path == "-1:b.png;;;0:a.png"


@pytest.mark.parametrize("name", INCUMBENT_FLAGS)
def test_every_flag_of_the_incumbent_exists(name, capsys):
    with pytest.raises(SystemExit):
        parse(FramePackGenerateFlags, description="", argv=["--help"])
    assert f"--{name} " in capsys.readouterr().out.replace("\n", " ")


@pytest.mark.parametrize(
    "argv",
    [
        ["--magcache_mag_ratios", "0"],
        ["--sample_solver", "dpm++"],
    ],
)
def test_known_flags_of_later_versions_answer_in_one_line(argv):
    with pytest.raises(UserError) as error:
        generate_flags(*argv)
    assert str(error.value).startswith(f"{argv[0]}: got ")
    assert "not available yet" in str(error.value)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--promt", "x"], "--promt: got --promt; expected a known option; did you mean --prompt?"),
        (["--video_size", "512"], "--video_size: got another number of values; expected 2 arguments"),
        (["--video_size", "512", "wide"], "--video_size: got wide; expected an integer"),
        (["--infer_steps", "2.5"], "--infer_steps: got 2.5; expected an integer"),
        (["--guidance_scale", "high"], "--guidance_scale: got high; expected a number"),
        (["--output_type", "image"], "did you mean images?"),
        (["--prompt"], "--prompt: got another number of values; expected one argument"),
        (["stray"], "stray: got stray"),
        (["--video_se", "3"], "ambiguous"),
    ],
)
def test_wrong_command_lines_are_explained_in_one_line(argv, message):
    with pytest.raises(UserError) as error:
        generate_flags(*argv)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_required_flag_is_named():
    with pytest.raises(UserError, match="--input.*got nothing"):
        parse(ConvertLoraFlags, description="", argv=["--target", "other"])


@dataclass(frozen=True, kw_only=True)
class Inner:
    size: tuple[int, int] = flag("two numbers", default=(1, 2))
    mode: Literal["a", "b", "c"] = flag("a mode", default="a", not_yet=("c",), alias="manner")


@dataclass(frozen=True, kw_only=True)
class Outer:
    inner: Inner
    names: tuple[str, ...] = flag("names", default=())
    wish: bool = later("something", default=False)


def test_nested_dataclasses_become_one_flat_command_line():
    flags = parse(Outer, description="", argv=["--size", "3", "4", "--names", "x", "y", "--manner", "b"])
    assert flags == Outer(inner=Inner(size=(3, 4), mode="b"), names=("x", "y"))
    assert parse(Outer, description="", argv=[]) == Outer(inner=Inner())


@dataclass(frozen=True, kw_only=True)
class Angle:
    degrees: float
    expected: ClassVar[str] = "an angle such as 90deg"

    @classmethod
    def parse(cls, text: str) -> "Angle":
        if not text.endswith("deg"):
            raise ValueError(text)
        return cls(degrees=float(text.removesuffix("deg")))

    def __str__(self) -> str:
        return f"{self.degrees:g}deg"


@dataclass(frozen=True, kw_only=True)
class Turned:
    turn: Angle = flag("how far", default=Angle(degrees=0))
    turns: tuple[Angle, ...] = flag("one after the other", default=())
    start: Angle | None = flag("from where")
    source: str = flag("what", required=True, alias="src")
    target: str = flag("into what", required=True)


def test_a_flags_type_may_read_its_own_text(capsys):
    argv = ["--turn", "90deg", "--turns", "-1deg", "2deg", "--start", "5deg", "--src", "a", "--target", "b"]
    flags = parse(Turned, description="", argv=argv)
    assert flags.turns == (Angle(degrees=-1), Angle(degrees=2))
    assert (flags.turn, flags.start, flags.source) == (Angle(degrees=90), Angle(degrees=5), "a")
    for text in ("90", "xdeg"):
        with pytest.raises(UserError, match=f"--turn: got {text}; expected an angle such as 90deg"):
            parse(Turned, description="", argv=["--turn", text])
    with pytest.raises(SystemExit):
        parse(Turned, description="", argv=["--help"])
    assert "how far (default: 0deg)" in capsys.readouterr().out


def test_all_missing_required_flags_are_named():
    with pytest.raises(UserError, match="^--source, --target: got nothing"):
        parse(Turned, description="", argv=[])


def test_a_misspelt_flag_is_named_rather_than_the_one_that_it_stood_for():
    with pytest.raises(UserError, match="did you mean --target"):
        parse(Turned, description="", argv=["--src", "a", "--targte", "b"])


@dataclass(frozen=True, kw_only=True)
class Positional:
    path: tuple[str, ...] = flag("files", required=True, positional=True)
    rest: Inner
    output: str = flag("a file", required=True)


@pytest.mark.parametrize(
    "argv",
    [["a 1", "二", "--output", "c"], ["--output", "c", "a 1", "二"], ["a 1", "--output", "c", "--mode", "a", "二"]],
)
def test_positionals_may_stand_anywhere_between_options(argv):
    flags = parse(Positional, description="", argv=argv)
    assert (flags.path, flags.output) == (("a 1", "二"), "c")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--output", "c"], "path: got nothing; expected a value; give path"),
        (["a", "b"], "--output: got nothing"),
        (
            ["a", "--out_put", "c", "--output", "c"],
            "--out_put: got --out_put; expected a known option; did you mean --output?",
        ),
    ],
)
def test_missing_positionals_and_options_beside_them_are_named(argv, message):
    with pytest.raises(UserError) as error:
        parse(Positional, description="", argv=argv)
    assert message in str(error.value)


def test_positionals_may_be_left_out_where_there_is_a_default():
    @dataclass(frozen=True, kw_only=True)
    class Optional:
        path: tuple[str, ...] = flag("files", default=("x",), positional=True)

    assert parse(Optional, description="", argv=[]).path == ("x",)
    assert parse(Optional, description="", argv=["a"]).path == ("a",)


def test_positionals_are_shown_in_the_help(capsys):
    with pytest.raises(SystemExit):
        parse(Positional, description="", argv=["--help"])
    text = capsys.readouterr().out
    assert "[options] path [path ...]" in text.splitlines()[0]
    assert "  path " in text


def test_a_user_error_becomes_one_line_on_stderr_and_exit_code_two(capsys):
    def fail(flags: Outer) -> None:
        raise UserError("--names", "a\nb", "c", "d")

    assert run_script(Outer, fail, description="", argv=[]) == 2
    assert capsys.readouterr().err == "--names: got a b; expected c; d\n"


def test_interrupting_a_script_exits_without_a_traceback(capsys):
    def interrupted(flags: Outer) -> None:
        raise KeyboardInterrupt

    assert run_script(Outer, interrupted, description="", argv=[]) == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_needs_neither_torch_nor_a_gpu(script):
    """Scripts import and answer --help on machines without CUDA, in a fraction of the time that torch needs."""
    code = (
        "import runpy, sys\n"
        f"sys.argv = [{script!r}, '--help']\n"
        "try:\n"
        f"    runpy.run_path({script!r}, run_name='__main__')\n"
        "except SystemExit as stop:\n"
        "    heavy = {'torch', 'numpy', 'PIL', 'av', 'transformers', 'diffusers', 'accelerate'} & set(sys.modules)\n"
        "    sys.exit(f'imported {heavy}' if heavy or stop.code else 0)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
    assert result.returncode == 0, result.stderr
    assert "--save_path" in result.stdout or "--help" in result.stdout
