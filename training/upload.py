"""Copies of LoRA files and states on the Hugging Face hub, and states from there.

Training does not stop for the network: a failed upload is reported, and counted for the end.
"""

from __future__ import annotations

import glob
import logging
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from options.errors import UserError, one_line
from options.flags_saving import HubFolder, UploadFlags

if TYPE_CHECKING:
    from huggingface_hub import HfApi

logger = logging.getLogger(__name__)


class Uploader:
    """Uploads to one repository, one after the other."""

    def __init__(self, flags: UploadFlags, api: HfApi | None = None) -> None:
        """Starts nothing yet.

        Args:
            flags: with a repository.
            api: the hub, to be left out but for tests.
        """
        self._flags = flags
        self._api = api or _hub(flags.huggingface_token)
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="upload") if flags.async_upload else None
        self._pending: dict[Path, Future[None]] = {}
        self.failed: list[Path] = []
        """What could not be uploaded."""

    @property
    def _where(self) -> dict[str, str]:
        return {"repo_id": self._flags.huggingface_repo_id, "repo_type": self._flags.huggingface_repo_type or "model"}

    def prepare(self) -> None:
        """Makes the repository if there is none; one that is there keeps its visibility. To be called before training.

        Raises:
            UserError: it cannot be made.
        """
        private = self._flags.huggingface_repo_visibility != "public"
        try:
            self._api.create_repo(**self._where, private=private, exist_ok=True)
        except Exception as error:
            got = f"{self._flags.huggingface_repo_id}: {error}"
            expected, remedy = "a repository that can be written to", "check --huggingface_token and the network"
            raise UserError("--huggingface_repo_id", got, expected, remedy) from error

    def upload(self, path: Path) -> None:
        """Copies a file or folder; with `--async_upload` it returns at once."""
        if self._executor is None:
            self._upload(path)
        else:
            self.settle(path)
            self._pending[path] = self._executor.submit(self._upload, path)

    def settle(self, path: Path) -> None:
        """Returns when nothing reads `path` any longer."""
        if (future := self._pending.pop(path, None)) is not None:
            future.result()

    def close(self) -> list[Path]:
        """Waits for all uploads; to be called at the end.

        Returns:
            What could not be uploaded.
        """
        if self._executor is not None:
            self._executor.shutdown()
        if self.failed:
            names = ", ".join(path.name for path in self.failed)
            logger.error("not uploaded to %s: %s", self._flags.huggingface_repo_id, names)
        return self.failed

    def _upload(self, path: Path) -> None:
        prefix = (self._flags.huggingface_path_in_repo or "").strip("/")
        target = f"{prefix}/{path.name}" if prefix else path.name
        try:
            if path.is_dir():
                self._api.upload_folder(folder_path=os.fspath(path), path_in_repo=target, **self._where)
            else:
                self._api.upload_file(path_or_fileobj=os.fspath(path), path_in_repo=target, **self._where)
        except Exception as error:
            self.failed.append(path)
            logger.error("%s could not be uploaded: %s", path.name, one_line(str(error)))
        else:
            self.failed = [other for other in self.failed if other != path]
            logger.info("uploaded %s to %s", path.name, self._flags.huggingface_repo_id)


def download_state(place: HubFolder, *, token: str | None, api: HfApi | None = None) -> Path:
    """The folder of `--resume_from_huggingface` on this machine.

    Raises:
        UserError: there is none, or the hub cannot be reached.
    """
    where = {"repo_id": place.repo_id, "repo_type": place.repo_type or "model", "revision": place.revision}
    try:
        snapshot = (api or _hub(token)).snapshot_download(**where, allow_patterns=[f"{glob.escape(place.path)}/*"])
    except Exception as error:
        got, remedy = f"{place.repo_id}: {error}", "check its name, --huggingface_token and the network"
        raise UserError("--resume", got, "a repository that can be read", remedy) from error
    folder = Path(snapshot) / place.path
    if not folder.is_dir():
        raise UserError("--resume", f"{place.repo_id}, which has no {place.path}", "a state folder", "check the path")
    return folder


def _hub(token: str | None) -> HfApi:
    from huggingface_hub import HfApi

    return HfApi(token=token)
