"""Uploads: what goes where, that training does not wait or fail for it, and states that come back."""

import threading
from pathlib import Path

import pytest

from options.errors import UserError
from options.flags_saving import HubFolder, SavingFlags, UploadFlags, check_saving, check_upload
from training.upload import Uploader, download_state


class Hub:
    """Stands in for the hub's client."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict]] = []
        self.num_inside = self.most_inside = 0
        self.gate = threading.Event()
        self.gate.set()
        self.broken: set[str] = set()

    def __getattr__(self, name: str):
        def call(**arguments: object):
            self.num_inside += 1
            self.most_inside = max(self.most_inside, self.num_inside)
            assert self.gate.wait(timeout=30)
            self.num_inside -= 1
            if name in self.broken:
                raise ConnectionError("the hub\nis away")
            self.calls.append((name, arguments))
            return self.answer

        return call

    answer: object = None


def uploader(hub: Hub, **flags: object) -> Uploader:
    given = UploadFlags(**{"huggingface_repo_id": "user/repo"} | flags)
    check_upload(given)
    return Uploader(given, hub)


@pytest.fixture
def lora(tmp_path) -> Path:
    path = tmp_path / "桜-000001.safetensors"
    path.write_bytes(b"x")
    return path


@pytest.mark.parametrize(
    ("prefix", "target"),
    [(None, "{}"), ("", "{}"), ("loras", "loras/{}"), ("/作品/loras/", "作品/loras/{}")],
)
def test_files_and_states_go_below_the_prefix(lora, prefix: str | None, target: str) -> None:
    hub = Hub()
    state = lora.with_name("桜-state")
    state.mkdir()
    to_hub = uploader(hub, huggingface_path_in_repo=prefix, huggingface_repo_type="dataset")
    to_hub.upload(lora), to_hub.upload(state)
    where = {"repo_id": "user/repo", "repo_type": "dataset"}
    file = {"path_or_fileobj": str(lora), "path_in_repo": target.format(lora.name)}
    folder = {"folder_path": str(state), "path_in_repo": target.format(state.name)}
    assert hub.calls == [("upload_file", file | where), ("upload_folder", folder | where)]


@pytest.mark.parametrize(("visibility", "private"), [(None, True), ("private", True), ("public", False)])
def test_a_new_repository_is_private_unless_it_is_to_be_public(visibility: str | None, private: bool) -> None:
    hub = Hub()
    uploader(hub, huggingface_repo_visibility=visibility).prepare()
    where = {"repo_id": "user/repo", "repo_type": "model"}
    assert hub.calls == [("create_repo", where | {"private": private, "exist_ok": True})]


def test_a_repository_that_cannot_be_made_stops_the_run_before_it_begins() -> None:
    hub = Hub()
    hub.broken = {"create_repo"}
    with pytest.raises(UserError, match="--huggingface_repo_id: got user/repo: the hub is away; .*--huggingface_token"):
        uploader(hub).prepare()


@pytest.mark.parametrize("is_async", [False, True])
def test_failed_uploads_are_reported_and_not_raised(lora, caplog, is_async: bool) -> None:
    hub = Hub()
    hub.broken = {"upload_file"}
    to_hub = uploader(hub, async_upload=is_async)
    to_hub.upload(lora)
    assert to_hub.close() == [lora]
    assert f"{lora.name} could not be uploaded: the hub is away" in caplog.text
    assert f"not uploaded to user/repo: {lora.name}" in caplog.text


def test_an_upload_that_succeeds_at_last_has_not_failed(lora) -> None:
    hub = Hub()
    hub.broken = {"upload_file"}
    to_hub = uploader(hub)
    to_hub.upload(lora)
    hub.broken = set()
    to_hub.upload(lora)
    assert to_hub.close() == []


def test_training_goes_on_while_files_are_uploaded_one_after_the_other(lora) -> None:
    hub = Hub()
    hub.gate.clear()
    to_hub = uploader(hub, async_upload=True)
    others = [lora.with_name(f"{number}.safetensors") for number in range(3)]
    for path in others:
        path.write_bytes(b"x")
        to_hub.upload(path)
    assert hub.calls == []
    hub.gate.set()
    assert to_hub.close() == []
    assert [arguments["path_in_repo"] for _, arguments in hub.calls] == [path.name for path in others]
    assert hub.most_inside == 1


def test_a_file_is_settled_when_its_upload_is_over(lora) -> None:
    hub = Hub()
    hub.gate.clear()
    to_hub = uploader(hub, async_upload=True)
    to_hub.upload(lora)
    waiting = threading.Thread(target=to_hub.settle, args=(lora,))
    waiting.start()
    waiting.join(timeout=0.1)
    assert waiting.is_alive() and hub.calls == []
    hub.gate.set()
    waiting.join(timeout=30)
    assert not waiting.is_alive() and len(hub.calls) == 1
    to_hub.settle(lora.with_name("never uploaded"))
    to_hub.close()


def test_without_async_an_upload_is_over_when_it_returns(lora) -> None:
    hub = Hub()
    to_hub = uploader(hub)
    to_hub.upload(lora)
    assert len(hub.calls) == 1
    to_hub.settle(lora)


# ---- states from the hub ----


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("u/r/p", ("u/r", "p", None, None)),
        ("u/r/a/b-state:main", ("u/r", "a/b-state", "main", None)),
        ("u/r/a/b-state:v1:dataset", ("u/r", "a/b-state", "v1", "dataset")),
    ],
)
def test_places_on_the_hub_are_read(text: str, expected: tuple) -> None:
    place = HubFolder.parse(text)
    assert (place.repo_id, place.path, place.revision, place.repo_type) == expected
    check_saving(SavingFlags(output_dir="o", output_name="x", resume=text, resume_from_huggingface=True))


@pytest.mark.parametrize("text", ["", "u", "u/r", "u/r/", "u//p", "u/r/p:", "u/r/p:a:b:c", "u/r/p::model"])
def test_what_is_no_place_on_the_hub_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="--resume: got .*expected user/repo/path"):
        HubFolder.parse(text)


def test_a_state_is_fetched_alone_and_from_its_revision(tmp_path) -> None:
    hub = Hub()
    hub.answer = str(tmp_path)
    (tmp_path / "作品 [1]" / "x-state").mkdir(parents=True)
    folder = download_state(HubFolder.parse("u/r/作品 [1]/x-state:v1:dataset"), token="t", api=hub)
    assert folder == tmp_path / "作品 [1]" / "x-state"
    ((name, arguments),) = hub.calls
    pattern = arguments.pop("allow_patterns")
    assert name == "snapshot_download" and arguments == {"repo_id": "u/r", "repo_type": "dataset", "revision": "v1"}
    from huggingface_hub.utils import filter_repo_objects

    files = ["作品 [1]/x-state/optimizer.pt", "作品 [1]/x-state2/optimizer.pt", "作品 1/x-state/a", "x.safetensors"]
    assert list(filter_repo_objects(files, allow_patterns=pattern)) == files[:1]


def test_a_state_that_is_not_on_the_hub_is_one_line(tmp_path) -> None:
    hub = Hub()
    hub.answer = str(tmp_path)
    with pytest.raises(UserError, match="--resume: got u/r, which has no x-state"):
        download_state(HubFolder.parse("u/r/x-state"), token=None, api=hub)
    hub.broken = {"snapshot_download"}
    with pytest.raises(UserError, match="--resume: got u/r: the hub is away"):
        download_state(HubFolder.parse("u/r/x-state"), token=None, api=hub)


# ---- the real client's signatures, and flags ----


def test_the_real_client_takes_what_is_given_to_it(lora, tmp_path, monkeypatch) -> None:
    from unittest.mock import create_autospec

    from huggingface_hub import HfApi

    api = create_autospec(HfApi, instance=True)
    api.snapshot_download.return_value = str(tmp_path)
    (tmp_path / "x-state").mkdir()
    to_hub = uploader(api)
    to_hub.prepare(), to_hub.upload(lora), to_hub.upload(tmp_path / "x-state")
    assert to_hub.close() == []
    assert download_state(HubFolder.parse("u/r/x-state"), token=None, api=api) == tmp_path / "x-state"
    assert api.create_repo.called and api.upload_file.called and api.upload_folder.called


def test_the_token_is_given_to_the_hub(monkeypatch) -> None:
    import huggingface_hub

    seen = []
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda token: seen.append(token))
    Uploader(UploadFlags(huggingface_repo_id="u/r", huggingface_token="secret"))
    assert seen == ["secret"]


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"huggingface_repo_id": "repo"}, "--huggingface_repo_id: got repo; expected user/repo"),
        ({"huggingface_repo_id": "a/b/c"}, "--huggingface_repo_id: got a/b/c"),
        ({"huggingface_repo_id": "桜/b"}, "--huggingface_repo_id: got 桜/b"),
        ({"save_state_to_huggingface": True}, "--save_state_to_huggingface: got no repository"),
        ({"async_upload": True}, "--async_upload: got no repository"),
    ],
)
def test_flags_about_uploads_that_cannot_work_are_refused(given, complaint: str) -> None:
    with pytest.raises(UserError) as caught:
        check_upload(UploadFlags(**given))
    assert str(caught.value).startswith(complaint)
    check_upload(UploadFlags())
