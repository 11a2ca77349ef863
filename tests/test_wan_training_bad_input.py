"""What is wrong with a Wan training or its caches: told in a line, before weights load, with nothing written."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import wan_cache_latents
from common.flags import parse
from common.weights import Checkpoint
from options.errors import UserError
from options.flags_wan_train import WanTrainFlags
from tests.cache_builders import image_set
from tests.published import described, published_wan
from tests.test_training_bad_input import LINE
from tests.wan_training_builders import WanShop, clip_item, one_frame_item, train, write_data, write_dit
from wan.architecture import WanArchitecture


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> Callable[..., WanShop]:
    """A transformer of some kind with one cached item for it, which a test may spoil."""
    folder = tmp_path_factory.mktemp("悪い")

    def make(task: str, item: dict, place: Path, kind: str | None = None, **keys: object) -> WanShop:
        data = write_data(place / "データ", {"猫": item}, batch_size=1, **keys)
        kind = kind or ("fun_control" if task.endswith("-FC") else task.partition("-")[0])
        return WanShop(folder=folder, dit=write_dit(folder, kind), data=data, task=task)

    return make


@pytest.fixture
def refused(tmp_path, capsys, monkeypatch) -> Callable[..., str]:
    """Runs a command and returns the one line that it answers."""

    def read_unless_trained(self):
        assert self.flag != "--dit", "weights were read before everything was checked"
        return read(self)

    def run(place: WanShop, **changes: object) -> str:
        capsys.readouterr()
        assert train(place.command(tmp_path / "出力", **changes)) == 2
        answer = capsys.readouterr()
        assert answer.out == "" and answer.err.count("\n") == 1 and LINE.fullmatch(answer.err.strip()), answer.err
        assert not (tmp_path / "出力").exists()
        return answer.err

    read = Checkpoint.read
    monkeypatch.setattr(Checkpoint, "read", read_unless_trained)
    return run


# ---- the model ----


def test_a_transformer_of_another_task(shop, refused, tmp_path) -> None:
    line = refused(shop("i2v-14B", one_frame_item(1), tmp_path, kind="t2v"))
    assert (
        line.startswith("--dit ") and "got a text-to-video transformer (16 input channels) with --task i2v-14B" in line
    )
    assert "use --task t2v-14B or t2v-1.3B or t2i-14B" in line
    line = refused(shop("i2v-14B", one_frame_item(1), tmp_path / "b", kind="flf2v"))
    assert "use --task flf2v-14B" in line


@pytest.mark.parametrize(("name", "task", "most"), [("t2v_1.3B", "t2v-1.3B", 29), ("i2v_14B", "i2v-14B", 39)])
def test_more_blocks_to_swap_than_the_published_models_may(name: str, task: str, most: int, monkeypatch) -> None:
    checkpoint = described("--dit", published_wan(name), "BF16")
    monkeypatch.setattr("wan.architecture.open_task_transformer", lambda *given, **named: checkpoint)
    place = WanShop(folder=Path(), dit=Path("dit"), data=Path("data"), task=task)

    def flags(number: int) -> WanTrainFlags:
        return parse_training(place.command(Path("出力"), blocks_to_swap=number))

    WanArchitecture.open(flags(most))
    with pytest.raises(UserError, match=rf"--blocks_to_swap: got {most + 1}; expected at most {most} in training"):
        WanArchitecture.open(flags(most + 1))


def parse_training(command: list[str]) -> WanTrainFlags:
    return parse(WanTrainFlags, description="", argv=command)


def test_more_blocks_than_there_are(shop, refused, tmp_path) -> None:
    place = shop("t2v-1.3B", clip_item(1), tmp_path)
    assert "--blocks_to_swap: got 3; expected at most 2 in training" in refused(place, blocks_to_swap=3)
    assert "--checkpoint_blocks: got 4; expected at most 3" in refused(place, checkpoint_blocks=4)


def test_networks_of_the_other_family(shop, refused, tmp_path) -> None:
    place = shop("t2v-1.3B", clip_item(1), tmp_path)
    assert "networks.lora_wan" in refused(place, network_module="networks.lora_framepack")
    name = "lora_unet_transformer_blocks_0_attn_to_q"
    foreign = {f"{name}.{part}.weight": torch.ones(4, 4) for part in ("lora_down", "lora_up")}
    save_file(foreign, tmp_path / "他.safetensors")
    for flag in ("network_weights", "base_weights"):
        assert "他.safetensors" in refused(place, **{flag: tmp_path / "他.safetensors"})


# ---- caches ----


def test_caches_that_show_something_else(shop, refused, tmp_path) -> None:
    line = refused(shop("flf2v-14B", clip_item(1), tmp_path / "a"))
    assert "mode is i2v in the cache, flf2v now" in line and "run wan_cache_latents.py" in line
    line = refused(shop("t2v-1.3B", one_frame_item(1), tmp_path / "b"))
    assert "mode is one_frame in the cache, t2v now" in line


def test_one_frame_caches_for_other_places(shop, refused, tmp_path) -> None:
    place = shop("flf2v-14B", one_frame_item(1, (0, 1, 2)), tmp_path, fp_1f_clean_indices=[0, 10])
    assert "f_indices is 0;1;2 in the cache, 0;1;10 now" in refused(place)


@pytest.mark.parametrize(
    ("task", "lacking"), [("i2v-14B", "clip"), ("t2v-1.3B-FC", "latents_control"), ("i2v-14B-FC", "clip")]
)
def test_caches_that_lack_what_the_task_is_shown(task: str, lacking: str, shop, refused, tmp_path) -> None:
    item = clip_item(1)
    del item[lacking]
    assert f"--dataset_config: got caches without {lacking}; expected caches with {lacking}" in refused(
        shop(task, item, tmp_path)
    )


def test_a_part_of_the_loss_that_no_clip_has(shop, refused, tmp_path) -> None:
    place = shop("i2v-14B", clip_item(1), tmp_path)
    assert "--one_frame_target_loss_only: got caches without f_indices" in refused(
        place, one_frame_target_loss_only=True
    )


def test_caches_that_were_made_with_other_settings(shop, refused, wan_encoders, tmp_path) -> None:
    """Ours, which say how they were made."""
    config = image_set(tmp_path, ["猫"], fp_1f_target_index=1)
    argv = ["--dataset_config", config, "--vae", wan_encoders.vae, "--clip", wan_encoders.clip, "--one_frame"]
    assert wan_cache_latents.main([str(part) for part in argv]) == 0
    place = replace(shop("i2v-14B", one_frame_item(1), tmp_path / "b"), data=config)
    assert "1 latent caches and no text cache" in refused(place)
    text = config.read_text(encoding="utf-8")
    config.write_text(text.replace("fp_1f_target_index = 1", "fp_1f_target_index = 5"), encoding="utf-8")
    line = refused(place)
    assert "target_index is 1 in the cache, 5 now" in line and "run wan_cache_latents.py" in line
    shutil.rmtree(tmp_path / "cache")
    assert "run wan_cache_latents.py" in refused(place)


def test_a_damaged_cache(shop, refused, tmp_path) -> None:
    place = shop("i2v-14B", one_frame_item(1), tmp_path)
    (cache,) = place.data.parent.glob("cache/猫_*x*_wan.safetensors")
    cache.write_bytes(cache.read_bytes()[:-7])
    assert cache.name in refused(place)


# ---- samples ----


@pytest.mark.parametrize(
    ("task", "line", "expected"),
    [
        ("i2v-14B", "猫 --of target_index=1,control_index=0 --i IMAGE", "--of: got no control image"),
        ("i2v-14B", "猫 --ci IMAGE --i IMAGE", "--of: got no target_index and no control_index"),
        ("i2v-14B", "猫 --ci IMAGE --of target_index=1", "no control_index"),
        ("i2v-14B", "猫 --ci IMAGE --of target_index=1024,control_index=0", "target_index=1024"),
        ("i2v-14B", "猫 --ci IMAGE --of target_index=0,control_index=0", "target_index=0 and a control image at 0"),
        ("flf2v-14B", "猫 --ci IMAGE --of target_index=1,control_index=0;2", "2 control indices (0;2) for 1 control"),
        ("i2v-14B", "猫 --ci IMAGE --of targt_index=1", "did you mean target_index"),
        ("i2v-14B", "猫 --ci IMAGE --of target_index=1,control_index=0 --w 100", "100"),
        ("i2v-14B", "猫 --ci IMAGE --of target_index=1,control_index=0 --f 5", "--f 5 with --of"),
    ],
)
def test_one_frame_prompts_that_cannot_be_made(
    task, line, expected, shop, wan_models, refused, material, tmp_path
) -> None:
    given = {"line": line.replace("IMAGE", str(material.chelsea)), "one_frame": True}
    assert expected in answer_to(shop, wan_models, refused, tmp_path, task, **given)


@pytest.mark.parametrize(
    ("task", "line", "expected"),
    [
        ("i2v-14B", "猫 --f 5", "--i: got nothing; expected the start image of --task i2v-14B"),
        ("flf2v-14B", "猫 --i IMAGE --f 5", "--ei: got nothing; expected the last frame"),
        ("flf2v-14B", "猫 --i IMAGE --ei IMAGE", "--f: got 1; expected 5 frames or more"),
        ("i2v-14B", "猫 --ci IMAGE --f 1 --i IMAGE", "--of"),
        ("i2v-14B", "猫 --i IMAGE --cn IMAGE", "--cn"),
    ],
)
def test_prompts_that_cannot_be_made(task, line, expected, shop, wan_models, refused, material, tmp_path) -> None:
    given = {"line": line.replace("IMAGE", str(material.chelsea)), "one_frame": False}
    assert expected in answer_to(shop, wan_models, refused, tmp_path, task, **given)


def answer_to(shop, models, refused, folder: Path, task: str, *, line: str, one_frame: bool) -> str:
    """To a file with this prompt."""
    kind = task.partition("-")[0]
    (folder / "例.txt").write_text(f"# comment\n{line}\n", encoding="utf-8")
    changes = {name: getattr(models.for_kind(kind), name) for name in ("dit", "vae", "t5", "clip")}
    changes |= {"sample_prompts": folder / "例.txt", "sample_at_first": True, "one_frame": one_frame}
    answer = refused(shop(task, clip_item(1, both_ends=kind == "flf2v"), folder), **changes)
    assert answer.startswith("例.txt line 2")
    return answer


def test_samples_of_an_image_model_without_clip(shop, refused, tmp_path) -> None:
    (tmp_path / "例.txt").write_text("猫", encoding="utf-8")
    given = {"sample_prompts": tmp_path / "例.txt", "sample_every_n_epochs": 1, "vae": "vae", "t5": "t5"}
    line = refused(shop("i2v-14B", one_frame_item(1), tmp_path), **given)
    assert line.startswith("--clip: got nothing; expected a model, which --sample_every_n_epochs needs")
