"""Tokenizers: where an encoder's is found, and the errors when there is none that fits."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from common.weights import Checkpoint
from options.errors import UserError, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "spiece.model")
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)*")


@dataclass(frozen=True, kw_only=True)
class TokenizerPlace:
    """Where an encoder's tokenizer is found, and how a message names it."""

    flag: str
    subfolders: tuple[str, ...]
    """In a snapshot; the first that is there."""
    encoder_subfolder: str
    """The encoder's own, beside it."""
    hub: str
    """The hub id, with the subfolder, for when there is no snapshot."""
    embedding: str
    """The encoder's tensor with one row for every token."""


def find_tokenizer(place: TokenizerPlace, *, given: str | None, checkpoint: Checkpoint) -> str:
    """Where `load_tokenizer` will look: a folder, or a hub id with the subfolder behind it. Loads and imports nothing.

    Args:
        given: by the user: a tokenizer's folder, a snapshot that holds one, or a hub id (`owner/name/subfolder`).
        checkpoint: the encoder's, whose snapshot is looked into when nothing was given.

    Raises:
        UserError: `given` is neither a tokenizer's folder nor a hub id.
    """
    if given is None:
        folder = checkpoint.files[0].parent
        snapshot = folder.parent if folder.name == place.encoder_subfolder else folder
        return _first_with_tokenizer(snapshot, place.subfolders) or place.hub
    if found := _first_with_tokenizer(Path(given), ("", *place.subfolders)):
        return found
    if os.path.exists(given) or not HUB_ID.fullmatch(given):
        raise UserError(place.flag, given, "a folder with a tokenizer (tokenizer.json) or a hub id", "check the path")
    return given


def _first_with_tokenizer(folder: Path, subfolders: Iterable[str]) -> str | None:
    return next((str(folder / name) for name in subfolders if _holds_tokenizer(folder / name)), None)


def _holds_tokenizer(folder: Path) -> bool:
    return any(os.path.isfile(folder / name) for name in TOKENIZER_FILES)


def load_tokenizer(place: TokenizerPlace, *, given: str | None, checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """The tokenizer of an encoder, from where `find_tokenizer` says.

    Raises:
        UserError: it cannot be had (no network, say), or it has more tokens than the encoder knows.
    """
    from transformers import AutoTokenizer

    source = find_tokenizer(place, given=given, checkpoint=checkpoint)
    parts = [source] if Path(source).is_dir() else source.split("/")
    repository, subfolder = "/".join(parts[:2]), "/".join(parts[2:])
    try:
        tokenizer = AutoTokenizer.from_pretrained(repository, subfolder=subfolder, trust_remote_code=False)
    except Exception as error:  # whatever transformers, its parsers or the network raise, the user's way out is one
        reason = one_line(str(error)).split(". ")[0][:200]
        remedy = f"give {place.flag} its folder, or a hub id that can be reached"
        raise UserError(place.flag, f"{source} ({type(error).__name__}: {reason})", "a tokenizer", remedy) from error
    num_rows = checkpoint.shape(place.embedding, 2)[0]
    if len(tokenizer) > num_rows:
        raise UserError(
            place.flag,
            f"{source}, {len(tokenizer)} tokens",
            f"at most the {num_rows} of {checkpoint.path}",
            "give the tokenizer that belongs to this encoder",
        )
    return tokenizer


def tokenizer_fingerprint(source: str) -> str:
    """A hash over the files of a tokenizer's folder; of one from the hub, its id."""
    digest = hashlib.sha256()
    for file in sorted(Path(source).iterdir()) if os.path.isdir(source) else ():
        if file.name in TOKENIZER_FILES:
            digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest() if os.path.isdir(source) else source
