"""The main jobs on the CPU, with small models that were trained on a toy world: `python quickstart.py demo`.

Everything goes through the scripts as a user would call them; the command lines are printed. What the acts are is told
in `demo/acts.py`, what the world is in `demo/toy/world.py`.
"""

import argparse
import contextlib
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from common.sheets import tiled
from demo.acts import ACTS, LONG, Played, Stage
from demo.encoders import ModelPaths
from demo.sheets import heading, in_two_columns, save_sheets
from demo.toy.trials import MODELS

ROOT = Path(__file__).resolve().parent.parent
TITLE = "Tiny models, trained on this world of moving shapes and on nothing else"
BYTES_PER_WEIGHT = 2
NOTE = """
The models are tiny (a transformer of {millions:.1f} million weights, FramePack's has 13 billion) and were trained on
this world of moving shapes alone, in pictures of 64 x 64 pixels. They have FramePack's architecture and go through the
same scripts. So the pictures show what the options mean, not how well FramePack itself does it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Plays the acts, draws the contact sheet and says where everything is."""
    options = parser().parse_args(argv)
    names = options.only or [name for name in ACTS if options.long or name not in LONG]
    output, models = options.output.resolve(), options.models.resolve()
    pictures = (options.pictures or output / "pictures").resolve()
    start = time.monotonic()
    # The scripts run here, and paths below it are short in what is printed.
    with contextlib.chdir(ROOT):
        stage = Stage(models=ModelPaths.under(_shown(models)), folder=_shown(output / "results"), call=call)
        if not stage.models.dit.is_dir():
            print(f"--models: got {models} without models; expected what demo.train_toy_world makes", file=sys.stderr)
            return 2
        try:
            played = [play(name, stage, _shown(pictures)) for name in names]
        except subprocess.CalledProcessError as error:
            print(f"demo: got exit code {error.returncode} from the command above; expected 0", file=sys.stderr)
            return 1
        made = finish(played, stage.models, _shown(output))
        print(f"\nDone in {time.monotonic() - start:.0f} seconds. Made:")
        for path in made:
            print(f"  {path}")
    return 0


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m demo.run", description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "demo_output", help="folder for everything that is made")
    parser.add_argument("--pictures", type=Path, help="folder for the documents' pictures (default: within --output)")
    parser.add_argument("--only", nargs="+", choices=list(ACTS), metavar="ACT", help=f"of {', '.join(ACTS)}")
    parser.add_argument("--long", action="store_true", help=f"also {', '.join(LONG)}, which takes some minutes")
    default = MODELS.dit.parent
    parser.add_argument("--models", type=Path, default=default, help="models of the toy world (default: %(default)s)")
    return parser


def play(name: str, stage: Stage, pictures: Path) -> Played:
    """One act, in a new folder of its own; its sheets are saved at once."""
    folder = stage.folder / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    print(f"\n--- {name}", flush=True)
    played = ACTS[name](replace(stage, folder=folder))
    return replace(played, made=(*played.made, *save_sheets(played.sheets, pictures)))


def call(command: Sequence[str]) -> None:
    """Runs a script and shows how a user would.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    print(f"\n{subprocess.list2cmdline(['python', *command])}\n", flush=True)
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True)


def finish(played: Sequence[Played], models: ModelPaths, output: Path) -> list[Path]:
    """Saves all sheets as one, prints the note, and returns everything that was made."""
    sheets = [sheet for one in played for sheet in one.sheets.values()]
    whole = in_two_columns(sheets)
    contact_sheet = output / "contact_sheet.png"
    tiled([[heading(TITLE, whole.width)], [whole]]).save(contact_sheet)
    num_bytes = sum(path.stat().st_size for path in models.dit.glob("*.safetensors"))
    print(NOTE.format(millions=num_bytes / BYTES_PER_WEIGHT / 1e6))
    return [*(path for one in played for path in one.made), contact_sheet]


def _shown(path: Path) -> Path:
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


if __name__ == "__main__":
    sys.exit(main())
