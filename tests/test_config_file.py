"""Options in a TOML file mean what they mean on the command line, and what is written can be read back."""

import logging
import tomllib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import pytest

from common.config_file import config_text
from common.flag_options import options_of, values_of
from common.flags import parse, run_script
from options.errors import UserError
from options.flag_fields import flag, later
from options.flags_fpack_train import FramePackTrainFlags
from options.flags_train import ConfigFlags
from options.memory_size import MemorySize
from options.step_count import StepCount
from options.swap_count import SwapCount


@dataclass(frozen=True, kw_only=True)
class Settings:
    path: str = flag("a path", required=True)
    rate: float = flag("a number", default=1.0)
    count: int | None = flag("how many", alias="number")
    mode: Literal["fast", "slow", "odd"] = flag("a mode", default="slow", not_yet=("odd",))
    loud: bool = flag("a switch", default=False)
    names: tuple[str, ...] = flag("names", default=())
    size: tuple[int, int] = flag("two numbers", default=(1, 2))
    warmup: StepCount = flag("steps or a share", default=StepCount())
    token: str | None = flag("a password", secret=True)
    turbo: bool = later("later", default=False)
    turbo_blocks: int | None = later("later")
    turbo_kind: str = later("later", default="big")


@dataclass(frozen=True, kw_only=True)
class Both:
    config: ConfigFlags
    settings: Settings


def read(folder: Path, text: str, *argv: str) -> Settings:
    """The settings from a file with this text and a command line."""
    file = folder / "設定.toml"
    file.write_text(text, encoding="utf-8")
    return parse(Both, description="", argv=["--config_file", str(file), *argv]).settings


def complaint(folder: Path, text: str, *argv: str) -> str:
    with pytest.raises(UserError) as error:
        read(folder, text, *argv)
    return str(error.value).replace(str(folder), "")


def test_a_files_values_count_without_any_on_the_command_line(tmp_path):
    text = 'path = "猫.png"\nrate = 0.5\ncount = 3\nmode = "fast"\nloud = true\nnames = ["a b", "c"]\nsize = [5, 6]\n'
    expected = Settings(path="猫.png", rate=0.5, count=3, mode="fast", loud=True, names=("a b", "c"), size=(5, 6))
    assert read(tmp_path, text) == expected


def test_the_command_line_wins_over_the_file_and_the_file_over_defaults(tmp_path):
    text = 'path = "a"\nrate = 0.5\nnames = ["x", "y"]\nmode = "fast"'
    settings = read(tmp_path, text, "--rate", "1.0", "--names", "z")
    assert settings == Settings(path="a", rate=1.0, names=("z",), mode="fast")


def test_a_required_option_may_come_from_the_file_and_is_missed_without(tmp_path):
    assert read(tmp_path, 'path = "a"').path == "a"
    assert complaint(tmp_path, "count = 1").startswith("--path: got nothing; expected a value")


def test_tables_only_give_order_and_the_last_value_wins(tmp_path, caplog):
    text = 'count = 1\n[files]\npath = "a"\n[numbers]\nrate = 2.5\ncount = 7\n'
    assert read(tmp_path, text) == Settings(path="a", rate=2.5, count=7)
    (record,) = caplog.records
    assert "設定.toml [numbers] count overrides" in record.message and record.levelno == logging.WARNING


def test_the_suffix_may_be_left_out(tmp_path):
    (tmp_path / "実験.v2.toml").write_text('path = "a"', encoding="utf-8")
    for name in ("実験.v2", "実験.v2.toml"):
        flags = parse(Both, description="", argv=["--config_file", str(tmp_path / name)])
        assert flags.settings.path == "a"
        assert flags.config.config_file == str(tmp_path / name)


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path):
    assert read(tmp_path, '\ufeffpath = "a"').path == "a"


def test_aliases_are_known_in_files_too(tmp_path):
    assert read(tmp_path, 'path = "a"\nnumber = 4').count == 4


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("rate = 2", "rate", 2.0),
        ('rate = "2e-4"', "rate", 2e-4),
        ('count = "12"', "count", 12),
        ('warmup = "10%"', "warmup", StepCount(value=0.1)),
        ('warmup = "100%"', "warmup", StepCount(value=1.0)),
        ("warmup = 0.25", "warmup", StepCount(value=0.25)),
        ("warmup = 100", "warmup", StepCount(value=100)),
        ("names = [1, 'b']", "names", ("1", "b")),
        ("loud = false", "loud", False),
    ],
)
def test_values_become_what_the_command_line_would_make_of_them(tmp_path, line, name, value):
    found = getattr(read(tmp_path, f'path = "a"\n{line}'), name)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("cuont = 3", "設定.toml cuont: got cuont; expected a known option; did you mean count?"),
        ("[numbers]\nrat = 3", "設定.toml [numbers] rat: got rat; expected a known option; did you mean rate?"),
        ("--rate = 3", "設定.toml --rate: got --rate; expected a known option; did you mean rate?"),
        ("count = 2.5", "設定.toml count: got 2.5; expected an integer"),
        ("count = true", "設定.toml count: got true; expected an integer"),
        ("count = 2024-01-01", "expected an integer"),
        ("rate = [1.0]", "設定.toml rate: got [1.0]; expected a number"),
        ('rate = "high"', "設定.toml rate: got high; expected a number"),
        ('warmup = "soon"', "設定.toml warmup: got soon; expected a whole number of steps (100), or a share"),
        ('mode = "fsat"', "設定.toml mode: got fsat; expected one of fast, slow, odd; did you mean fast?"),
        ('mode = "odd"', "odd is not available yet"),
        ('loud = "true"', '設定.toml loud: got "true"; expected true or false; write it without quotes'),
        ("loud = 1", "設定.toml loud: got 1; expected true or false"),
        ('names = "a b"', '設定.toml names: got "a b"; expected a TOML array; write names = ["a b"]'),
        ("names = [true]", "設定.toml names: got true; expected a text"),
        ("token = 1.10", '設定.toml token: got 1.1; expected a text; write token = "…"'),
        ("size = [1, 2, 3]", "設定.toml size: got [1, 2, 3]; expected 2 values"),
        ("[a.b]\nrate = 1", "設定.toml [a] b: got b; expected a known option"),
        ("turbo = true", "設定.toml turbo: got true; expected this option to be left out; not available yet"),
        ("turbo_blocks = 20", "設定.toml turbo_blocks: got 20; expected this option to be left out; not available yet"),
        ('turbo_kind = "small"', "設定.toml turbo_kind: got small; expected this option to be left out"),
        ('config_file = "b.toml"', "設定.toml config_file: got config_file; expected options other than this"),
        ('output_config = "b"', "設定.toml output_config: got output_config; expected options other than this"),
        ("rate = ", "--config_file: got"),
        ('token = "C:\\users"', "write \\ in a path as / or put the path in 'single quotes'"),
        (f"count = 0x{'f' * 5000}", "expected an integer"),
    ],
)
def test_what_is_wrong_in_a_file_is_said_in_one_line(tmp_path, line, message):
    text = f"path = 'a'\n{line}" if not line.startswith("[") else f"{line}\npath = 'a'"
    found = complaint(tmp_path, text)
    assert message in found and "\n" not in found


def test_everything_wrong_in_a_file_is_said_at_once(tmp_path):
    lines = complaint(tmp_path, "rate = true\ncount = 1.5\nsped = 3").splitlines()
    assert [line.split(": ")[0].split()[-1] for line in lines] == ["rate", "count", "sped"]


@pytest.mark.parametrize("line", ["turbo = false", "turbo_blocks = 0", 'turbo_kind = "big"'])
def test_options_of_later_versions_may_stand_in_a_file_when_they_are_off(tmp_path, line):
    assert read(tmp_path, f"path = 'a'\n{line}") == Settings(path="a")


def test_files_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "latin.toml").write_bytes('path = "é"'.encode("latin-1"))
    (tmp_path / "folder.toml").mkdir()
    cases = {"nowhere": "there is no such file", "folder": "it is a folder", "latin": "expected text in UTF-8"}
    for name, message in cases.items():
        with pytest.raises(UserError) as error:
            parse(Both, description="", argv=["--config_file", str(tmp_path / name)])
        assert f"{name}.toml" in str(error.value) and message in str(error.value)


# ---- writing ----

TEXTS = [
    "😀",
    '"quoted"',
    "C:\\users\\x41\\猫",
    "tab\there",
    "del\x7f esc\x1b",
    "line\nbreak",
    "\u2028",
    "#no comment",
    "'it'",
]


@pytest.mark.parametrize("text", TEXTS)
def test_any_text_can_be_written_and_read_back(tmp_path, text):
    settings = Settings(path=text, names=tuple(TEXTS))
    written = config_text(Both(config=ConfigFlags(), settings=settings))
    assert tomllib.loads(written)["settings"]["path"] == text
    assert read(tmp_path, written) == settings


@pytest.mark.parametrize("rate", [2e-6, 1e-300, 1.5e22, 0.1, 3.0, -0.5, float("inf")])
def test_any_number_can_be_written_and_read_back(tmp_path, rate):
    settings = Settings(path="a", rate=rate, count=2**62)
    assert read(tmp_path, config_text(Both(config=ConfigFlags(), settings=settings))) == settings


def example(option) -> list[str]:
    """Values for one option that are not its default, as texts."""
    if option.kind is bool:
        return []
    not_yet = option.metadata.get("not_yet", ())
    choices = [text for text in option.choices if text not in (option.default, *not_yet)]
    texts = {str: ["C:\\モデル\\x", 'b "c"'], int: ["3", "40"], float: ["2.5e-07", "7"]}
    texts |= {SwapCount: ["12"], MemorySize: ["11.5GiB"]}
    values = choices or texts.get(option.kind, ["12%"])
    num_values = {None: 1, "*": 2}.get(option.num_values, option.num_values)
    return (values * 2)[:num_values]


def test_every_option_of_training_can_be_written_and_read_back(tmp_path):
    argv: list[str] = []
    written = []
    for option in options_of(FramePackTrainFlags):
        if not option.is_refused and not option.metadata.get("secret") and option.group != "config":
            argv += [f"--{option.name}", *example(option)]
            written.append(option.name)
    flags = parse(FramePackTrainFlags, description="", argv=argv)
    defaults = dict(values_of(parse(FramePackTrainFlags, description="", argv=[])))
    assert [name for name, value in values_of(flags) if name in written and value == defaults[name]] == []
    file = tmp_path / "全部.toml"
    assert write(file, *argv) == 0
    assert set(written) == {key for table in tomllib.loads(file.read_text(encoding="utf-8")).values() for key in table}
    again = parse(FramePackTrainFlags, description="", argv=["--config_file", str(file)])
    assert replace(again, config=ConfigFlags()) == flags


def test_a_file_of_defaults_reads_back_to_the_defaults(tmp_path):
    file = tmp_path / "defaults.toml"
    assert write(file) == 0
    again = parse(FramePackTrainFlags, description="", argv=["--config_file", str(file)])
    assert replace(again, config=ConfigFlags()) == parse(FramePackTrainFlags, description="", argv=[])
    assert "max_train_steps = 1600\n" in file.read_text(encoding="utf-8")


def write(file: Path, *argv: str) -> int:
    """Runs a script that must not run, with --output_config."""
    argv = [*argv, "--output_config", str(file)]
    return run_script(FramePackTrainFlags, lambda flags: pytest.fail("it ran"), description="", argv=argv)


def test_secrets_are_not_written(tmp_path):
    file = tmp_path / "a.toml"
    assert write(file, "--huggingface_token", "hf_secret", "--wandb_api_key", "key_secret") == 0
    text = file.read_text(encoding="utf-8")
    assert "secret" not in text and "huggingface_token" not in text and "wandb_api_key" not in text


def test_what_a_config_file_said_is_written_too(tmp_path):
    (tmp_path / "old.toml").write_text("seed = 5\n", encoding="utf-8")
    assert write(tmp_path / "new", "--config_file", str(tmp_path / "old"), "--max_train_steps", "7") == 0
    run = tomllib.loads((tmp_path / "new.toml").read_text(encoding="utf-8"))["run"]
    assert (run["seed"], run["max_train_steps"]) == (5, 7)


def test_no_file_is_overwritten(tmp_path, capsys):
    file = tmp_path / "mine.toml"
    file.write_text("# my notes", encoding="utf-8")
    assert write(tmp_path / "mine") == 2
    assert "mine.toml; expected a file that is not there yet" in capsys.readouterr().err
    assert file.read_text(encoding="utf-8") == "# my notes"


def test_a_place_that_cannot_be_written_to_is_an_error_in_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("", encoding="utf-8")
    assert write(tmp_path / "file" / "a.toml") == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_full_disk_is_an_error_in_one_line(tmp_path, capsys, monkeypatch):
    def full(path, data) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert write(tmp_path / "a.toml") == 2
    assert capsys.readouterr().err.endswith("No space left on device\n")
    assert list(tmp_path.iterdir()) == []


def test_of_several_processes_one_writes(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert write(tmp_path / "a.toml") == 0
    assert not (tmp_path / "a.toml").exists()
    monkeypatch.setenv("RANK", "0")
    assert write(tmp_path / "a.toml") == 0
    assert (tmp_path / "a.toml").exists()


def test_scripts_without_these_options_know_nothing_of_them():
    with pytest.raises(UserError, match="--config_file"):
        parse(Settings, description="", argv=["--path", "a", "--config_file", "b"])
