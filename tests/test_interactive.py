"""`--interactive`: nothing that happens to one prompt ends the session, and the models stay."""

import io
import os
import re
import select
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from skimage import data_dir

from generation import interactive
from generation.interactive import console_reader, interact
from options.errors import UserError
from options.fpack_request import FramePackRequestFlags
from options.line_options import options_help

CAT = str(Path(data_dir) / "chelsea.png")
NAMES = ("dit", "vae", "text_encoder1", "text_encoder2", "image_encoder")
DEADLINE = 120
"""Seconds until a session fails its test."""
PROMPT = r">( |\x08|\x1b)"
"""prompt_toolkit, where it is installed, moves the cursor instead of writing the space."""

GENERATION_OPTIONS = FramePackRequestFlags.line_options
HELP = options_help(GENERATION_OPTIONS)


def session(*events: str | BaseException, fails: dict[str, BaseException] | None = None) -> list[str]:
    """Runs the loop over what a user types, exceptions among it, and returns the lines that were generated."""
    typed, generated = iter(events), []

    def read() -> str:
        event = next(typed)
        if isinstance(event, BaseException):
            raise event
        return event

    def generate(line: str) -> None:
        generated.append(line)
        if fails and line in fails:
            raise fails[line]

    interact(generate, read, help=HELP)
    assert next(typed, None) is None, "the session ended before the input did"
    return generated


@pytest.mark.parametrize("end", [EOFError(), "\x04", "\x1a", " \x04\n"])
def test_the_session_ends_with_the_input_or_an_end_character(end):
    assert session("a cat", end) == ["a cat"]


def test_empty_lines_are_ignored_and_white_space_is_no_part_of_a_prompt():
    assert session("", "   \t", " 窓辺の猫 --d 1\n", EOFError()) == ["窓辺の猫 --d 1"]


def test_help_prints_every_inline_option_and_generates_nothing(capsys):
    assert session("help", " help ", EOFError()) == []
    shown = re.findall(r"^ *--(\w+) +\w", capsys.readouterr().out, re.MULTILINE)
    assert shown == [*GENERATION_OPTIONS] * 2


def test_a_user_error_is_one_line_and_the_session_goes_on(capsys):
    error = UserError("prompt", "--dd", "a known option", "did you mean --d?")
    assert session("a --dd 1", "b", EOFError(), fails={"a --dd 1": error}) == ["a --dd 1", "b"]
    assert capsys.readouterr().err == "prompt: got --dd; expected a known option; did you mean --d?\n"


@pytest.mark.parametrize("error", [RuntimeError("out of\nmemory"), EOFError("truncated file"), MemoryError()])
def test_a_generation_that_fails_is_one_line_and_the_session_goes_on(error, capsys):
    assert session("a", "b", EOFError(), fails={"a": error}) == ["a", "b"]
    answer = capsys.readouterr().err
    assert answer.count("\n") == 1 and type(error).__name__ in answer and " ".join(str(error).split()) in answer


def test_ctrl_c_at_the_prompt_and_during_a_generation_goes_on():
    assert session(KeyboardInterrupt(), "a", "b", EOFError(), fails={"a": KeyboardInterrupt()}) == ["a", "b"]


def test_bytes_that_are_no_text_are_asked_for_again():
    broken = UnicodeDecodeError("utf-8", b"\xe3", 0, 1, "unexpected end of data")
    assert session(broken, "a", EOFError()) == ["a"]


class PromptSession:
    """In place of prompt_toolkit's."""

    def prompt(self, message: str) -> str:
        return f"edited after {message}"


@pytest.mark.parametrize(
    ("is_installed", "is_terminal", "expected"),
    [
        (True, True, "edited after > "),
        (True, False, "piped"),
        (False, True, "plain after > "),
        (False, False, "piped"),
    ],
)
def test_line_editing_needs_prompt_toolkit_and_a_terminal(is_installed, is_terminal, expected, monkeypatch):
    module = SimpleNamespace(PromptSession=PromptSession) if is_installed else None
    monkeypatch.setitem(sys.modules, "prompt_toolkit", module)
    monkeypatch.setattr(
        interactive.sys, "stdin", SimpleNamespace(isatty=lambda: is_terminal, buffer=io.BytesIO(b"piped"))
    )
    monkeypatch.setattr("builtins.input", lambda message: f"plain after {message}")
    assert console_reader()() == expected


def test_bytes_that_are_no_text_spoil_only_their_own_line(monkeypatch, capsys):
    """A file of prompts piped in, one line of which is in another encoding."""
    lines = "猫\n".encode() + b"\xff\xfe\n" + "犬".encode()
    monkeypatch.setattr(interactive.sys, "stdin", SimpleNamespace(isatty=lambda: False, buffer=io.BytesIO(lines)))
    generated = []
    interact(generated.append, console_reader(), help=HELP)
    assert generated == ["猫", "犬"]
    assert "no text" in capsys.readouterr().err


class Terminal:
    """A process on a pseudo-terminal of its own, typed to and read like by a user."""

    def __init__(self, argv: list[str], folder: Path) -> None:
        import pty
        import termios

        self._master, slave = pty.openpty()
        termios.tcsetwinsize(slave, (24, 100))
        # A controlling terminal, so that Ctrl-C becomes an interrupt as in a real one; also where the suite runs in
        # the background, with interrupts ignored.
        take = "signal.signal(signal.SIGINT, signal.SIG_DFL); fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
        take += "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"import fcntl, os, signal, sys, termios; {take}", *argv],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            cwd=folder,
            env=os.environ | {"TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"},
            start_new_session=True,
        )
        os.close(slave)
        self._deadline = time.monotonic() + DEADLINE
        self._seen = 0
        self.text = ""

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def wait_for(self, pattern: str) -> None:
        """Reads until `pattern` appears after what earlier waits have found."""
        while not (match := re.compile(pattern).search(self.text, self._seen)):
            assert self._read(), f"ended without {pattern!r}:\n{self.text}"
        self._seen = match.end()

    def end(self) -> int:
        """Reads what is left and returns the exit code."""
        while self._read():
            pass
        return self._process.wait(timeout=DEADLINE)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._master)

    def _read(self) -> bool:
        """Whether there was more to read."""
        left = self._deadline - time.monotonic()
        assert left > 0 and select.select([self._master], [], [], left)[0], f"nothing more came:\n{self.text}"
        try:
            data = os.read(self._master, 65536)
        except OSError:  # how Linux says that the other side is closed
            return False
        self.text += data.decode("utf-8", "replace")
        return bool(data)


@pytest.fixture
def terminal(demo_models, repository, tmp_path):
    models = [part for name in NAMES for part in (f"--{name}", str(getattr(demo_models, name)))]
    options = ["--video_size", "32", "32", "--infer_steps", "1", "--one_frame_inference", "default", "--seed", "1"]
    inputs = ["--image_path", CAT, "--control_image_path", CAT]
    script = [str(repository / "fpack_generate_video.py"), "--interactive"]
    argv = [*script, *models, *options, *inputs, "--output_type", "images", "--save_path", str(tmp_path / "結果")]
    terminal = Terminal(argv, tmp_path)
    yield terminal
    terminal.close()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo-terminals in Python")
def test_a_session_at_a_terminal(terminal, tmp_path):
    """Right, wrong, stopped with Ctrl-C while it denoises, right again with the prompt of before, Ctrl+D."""
    terminal.wait_for(PROMPT)
    terminal.type("窓辺の猫\r")
    terminal.wait_for("saved .*_1.png")
    terminal.wait_for(PROMPT)
    terminal.type("窓辺の猫 --cii a.png\r")
    terminal.wait_for("got --cii; expected a known option; did you mean --ci")
    terminal.wait_for(PROMPT)
    terminal.type("窓辺の猫 --s 500\r")
    terminal.wait_for(r"steps: .* [1-9]\d*/500 ")
    terminal.type("\x03")
    terminal.wait_for("interrupted")
    terminal.wait_for(PROMPT)
    terminal.type("窓辺の猫 --d 2\r")
    terminal.wait_for("saved .*_2.png")
    terminal.wait_for(PROMPT)
    terminal.type("\x04")
    assert terminal.end() == 0
    loaded = re.findall(r"(\w+) loaded in", terminal.text)
    # Text and images are equal in all prompts, so their encoders came in for the first one only.
    assert loaded == ["LLaMA", "CLIP", "SigLIP", "VAE", "transformer"]
    assert "Traceback" not in terminal.text
    names = sorted(path.name for path in (tmp_path / "結果").iterdir())
    assert [name.rpartition("_")[2] for name in names] == ["1.png", "2.png"]
