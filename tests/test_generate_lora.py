"""LoRAs in `fpack_generate_video.py`: merged for a whole run, or laid over the model for one prompt."""

import json
import logging
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from skimage import data_dir

import fpack_generate_video
from common.weights import Checkpoint
from frame_pack.loading import build_transformer, load_transformer, open_transformer
from generation.outputs import load_latents
from networks import loha, lokr, lora_framepack
from networks import network as network_module
from networks.prompt_loras import PromptLoras
from options.lora import PromptLora

KINDS = {"LoRA": lora_framepack, "LoHa": loha, "LoKr": lokr}
TINY = ("--video_size", "32", "32", "--infer_steps", "2", "--one_frame_inference", "default", "--seed", "1")
TOLERANCE = 5e-5
"""Of latents after two steps, in which the rounding of single forwards (1e-5 at most) grows."""


@pytest.fixture(scope="module")
def models(demo_models) -> list[str]:
    names = ("dit", "vae", "text_encoder1", "text_encoder2", "image_encoder")
    return [part for name in names for part in (f"--{name}", str(getattr(demo_models, name)))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("絵 [1]")


@pytest.fixture(scope="module")
def cat(folder: Path) -> str:
    return str(shutil.copy(Path(data_dir) / "chelsea.png", folder / "猫.png"))


@pytest.fixture(scope="module")
def loras(demo_models, folder: Path) -> dict[str, str]:
    """One of each kind for the small transformer, strong enough to be seen."""
    transformer = build_transformer(open_transformer(str(demo_models.dit)))
    paths = {}
    for seed, (kind, module) in enumerate(KINDS.items()):
        network = module.create_network(transformer, dim=2, alpha=1.0, args={}, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        for parameter in network.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
        paths[kind] = str(folder / f"{kind} 絵.safetensors")
        network.save(paths[kind], metadata={})
    return paths


@pytest.fixture(scope="module")
def latents(models, cat, folder) -> Callable[..., list[torch.Tensor]]:
    """Runs the script, once for the same arguments, and returns the latents that it saved, in order."""

    @cache
    def make(*argv: str) -> list[torch.Tensor]:
        output = folder / f"結果 {make.cache_info().currsize}"
        common = [*models, *TINY, "--image_path", cat, "--save_path", str(output), "--output_type", "latent"]
        assert fpack_generate_video.main([*common, *argv]) == 0
        return [load_latents(path, flag="x")[0] for path in sorted(output.glob("*.safetensors"))]

    return make


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_lora_gives_what_an_applied_one_gives(kind: str, loras, latents) -> None:
    (plain,) = latents("--prompt", "猫")
    (merged,) = latents("--prompt", "猫", "--lora_weight", loras[kind], "--lora_multiplier", "0.5")
    (applied,) = latents("--prompt", "猫", "--lora", f"{loras[kind]}:0.5")
    assert difference(merged, plain) > 1e-3, "the LoRA has an effect"
    assert difference(applied, merged) <= TOLERANCE


def test_loras_are_merged_with_and_without_the_lycoris_option(loras, latents) -> None:
    (plain,) = latents("--prompt", "猫", "--lora_weight", loras["LoKr"])
    (asked,) = latents("--prompt", "猫", "--lora_weight", loras["LoKr"], "--lycoris")
    assert torch.equal(plain, asked)


def test_patterns_reach_the_merge(loras, latents) -> None:
    (whole,) = latents("--prompt", "猫", "--lora_weight", loras["LoRA"])
    (part,) = latents("--prompt", "猫", "--lora_weight", loras["LoRA"], "--include_patterns", "single")
    (rest,) = latents("--prompt", "猫", "--lora_weight", loras["LoRA"], "--exclude_patterns", "single")
    (both,) = latents(
        *("--prompt", "猫", "--lora_weight", loras["LoRA"], loras["LoRA"]),
        *("--include_patterns", "single", "", "--exclude_patterns", "", "single"),
    )
    assert difference(part, whole) > 1e-3 and difference(rest, whole) > 1e-3
    assert difference(both, whole) <= TOLERANCE


def test_every_line_of_a_batch_has_its_own_loras_on_one_loaded_model(
    loras, latents, folder, tmp_path, monkeypatch
) -> None:
    """And the lines without any give what they gave before, bit for bit."""
    reads = []
    read = Checkpoint.read
    monkeypatch.setattr(Checkpoint, "read", lambda self: reads.append(self.flag) or read(self))
    lines = [
        "猫",
        f"猫 --lora {loras['LoRA']}:0.5",
        "猫",
        f"猫 --lora {loras['LoRA']}:0.25 --lora {loras['LoRA']}:0.25",
        f"猫 --lora {loras['LoHa']} --lora {loras['LoKr']}:-0.5",
        "猫",
    ]
    (tmp_path / "行.txt").write_text("\n".join(lines), encoding="utf-8")
    plain, half, plain_again, twice, two, last = latents("--from_file", str(tmp_path / "行.txt"))
    assert reads.count("--dit") == 1
    assert torch.equal(plain, plain_again) and torch.equal(plain, last)
    assert difference(half, plain) > 1e-3 and difference(twice, half) <= TOLERANCE
    (merged,) = latents(
        "--prompt", "猫", "--lora_weight", loras["LoHa"], loras["LoKr"], "--lora_multiplier", "1", "-.5"
    )
    assert difference(two, merged) <= TOLERANCE


def test_a_prompts_lora_comes_beside_those_of_the_run(loras, latents) -> None:
    (beside,) = latents("--prompt", "猫", "--lora_weight", loras["LoHa"], "--lora", loras["LoRA"])
    (merged,) = latents("--prompt", "猫", "--lora_weight", loras["LoHa"], loras["LoRA"])
    assert difference(beside, merged) <= TOLERANCE


def test_the_strength_of_a_lora_can_be_swept(models, loras, cat, latents, tmp_path) -> None:
    (plain,) = latents("--prompt", "猫")
    off, half, full = latents("--prompt", "猫", "--lora", loras["LoRA"], "--sweep", "lora=0..1:0.5")
    (alone,) = latents("--prompt", "猫", "--lora", loras["LoRA"])
    assert torch.equal(off, plain) and torch.equal(full, alone)
    assert 1e-3 < difference(half, plain) < difference(full, plain)


def test_a_saved_model_gives_what_the_merge_gave(models, loras, cat, latents, tmp_path) -> None:
    """Only the rounding to the type of the model's file is between them."""
    saved = tmp_path / "保存.safetensors"
    argv = ["--lora_weight", loras["LoRA"], "--save_merged_model", str(saved)]
    assert fpack_generate_video.main([*models[:2], *argv]) == 0
    (merged,) = latents("--prompt", "猫", "--lora_weight", loras["LoRA"])
    (from_file,) = latents("--prompt", "猫", "--dit", str(saved))
    assert difference(from_file, merged) < 0.05
    (plain,) = latents("--prompt", "猫")
    assert difference(from_file, merged) < difference(merged, plain) / 10


def test_a_result_knows_its_loras_and_is_made_again_with_them(models, loras, cat, tmp_path, caplog) -> None:
    common = [*models, "--output_type", "images"]
    merged = ["--lora_weight", loras["LoHa"], "--lora_multiplier", "0.5"]
    prompt = [*TINY, "--prompt", "猫", "--image_path", cat, "--lora", f"{loras['LoRA']}:0.5"]
    assert fpack_generate_video.main([*common, *merged, *prompt, "--save_path", str(tmp_path / "a")]) == 0
    (first,) = (tmp_path / "a").glob("*.png")
    with Image.open(first) as picture:
        settings = json.loads(next(text for text in picture.info.values() if '"request"' in str(text)))
    assert [lora["multiplier"] for lora in settings["request"]["loras"]] == [0.5]
    assert "LoRA 絵.safetensors" in {known["name"] for known in settings["inputs"].values()}

    again = ["--from_metadata", str(first), "--search_dir", str(Path(cat).parent)]
    assert fpack_generate_video.main([*common, *merged, *again, "--save_path", str(tmp_path / "b")]) == 0
    (second,) = (tmp_path / "b").glob("*.png")
    assert first.read_bytes() == second.read_bytes()

    caplog.clear()
    assert fpack_generate_video.main([*common, *again, "--save_path", str(tmp_path / "c")]) == 0
    (said,) = [record.message for record in caplog.records if "--lora_weight is not what made" in record.message]
    assert "LoHa 絵.safetensors:0.5" in said

    renamed = [
        "--lora_weight",
        str(shutil.copy(loras["LoHa"], tmp_path / "新.safetensors")),
        "--lora_multiplier",
        "0.5",
    ]
    caplog.clear()
    assert fpack_generate_video.main([*common, *again, *renamed, "--save_path", str(tmp_path / "d")]) == 0
    assert not any("--lora_weight" in record.message and "not what" in record.message for record in caplog.records)


def test_a_model_whose_names_have_a_prefix_is_the_same_model(models, loras, demo_models, latents, folder) -> None:
    tensors = {f"model.diffusion_model.{name}": t for name, t in open_transformer(str(demo_models.dit)).read()}
    save_file(tensors, folder / "prefixed.safetensors")
    prefixed = ["--prompt", "猫", "--dit", str(folder / "prefixed.safetensors"), "--lora_weight", loras["LoRA"]]
    assert torch.equal(latents(*prefixed)[0], latents("--prompt", "猫", "--lora_weight", loras["LoRA"])[0])


@pytest.mark.parametrize("where", ["apply", "remove"])
def test_an_interrupt_leaves_no_lora_behind(where: str, loras, demo_models, monkeypatch) -> None:
    """Ctrl-C may come at any moment; the next prompt has its own LoRAs and no others."""
    checkpoint = open_transformer(str(demo_models.dit))
    transformer = load_transformer(checkpoint, dtype=torch.float32, device="cpu")
    classes = [type(module) for module in transformer.modules()]
    prompt_loras, calls = PromptLoras(checkpoint), 0
    chosen = [PromptLora(path=loras[kind], multiplier=1.0) for kind in ("LoRA", "LoHa")]
    attach = network_module.attach

    def interrupted(*arguments: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 40:  # in the second network
            raise KeyboardInterrupt
        attach(*arguments)

    if where == "apply":
        monkeypatch.setattr(network_module, "attach", interrupted)
    with pytest.raises(KeyboardInterrupt), prompt_loras.on(transformer, chosen):
        raise KeyboardInterrupt
    assert [type(module) for module in transformer.modules()] == classes
    monkeypatch.undo()
    with prompt_loras.on(transformer, chosen):
        assert [type(module) for module in transformer.modules()] != classes
    assert [type(module) for module in transformer.modules()] == classes


def test_what_is_used_of_each_file_is_said_once(models, loras, cat, tmp_path, caplog) -> None:
    caplog.set_level(logging.INFO)
    (tmp_path / "p.txt").write_text(f"a --lora {loras['LoRA']}\nb --lora {loras['LoRA']}:0.5\n", encoding="utf-8")
    argv = [*models, *TINY, "--image_path", cat, "--save_path", str(tmp_path / "o"), "--check"]
    argv += ["--lora_weight", loras["LoHa"], "--from_file", str(tmp_path / "p.txt")]
    assert fpack_generate_video.main(argv) == 0
    said = [record.message for record in caplog.records if "modules" in record.message]
    assert [text.split(".")[0] for text in said] == ["LoHa 絵", "LoRA 絵"]


# ---- bad input: one line, before any weight is read ----


@pytest.fixture
def refused(models, cat, tmp_path, monkeypatch, capsys) -> Callable[..., str]:
    """Runs the script, which must say one line and read no weight and write nothing; returns the line."""

    def never(self) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(Checkpoint, "read", never)

    def run(*argv: str, lines: int = 1) -> str:
        output = tmp_path / "結果"
        code = fpack_generate_video.main([*models, *TINY, "--image_path", cat, "--save_path", str(output), *argv])
        said = [line for line in capsys.readouterr().err.splitlines() if ": got " in line]
        assert code == 2 and len(said) == lines and not output.exists()
        return "\n".join(said)

    return run


@pytest.fixture
def bad(tmp_path, loras) -> Callable[[str], str]:
    """A LoRA file that cannot be used."""

    def make(kind: str) -> str:
        path = tmp_path / f"{kind}.safetensors"
        if kind == "truncated":
            path.write_bytes(Path(loras["LoRA"]).read_bytes()[:-100])
            return str(path)
        names = {"wan": "lora_unet_blocks_0_self_attn_q", "shape": "lora_unet_transformer_blocks_0_attn_to_q"}
        name = names[kind]
        save_file({f"{name}.lora_down.weight": torch.ones(2, 6), f"{name}.lora_up.weight": torch.ones(6, 2)}, path)
        return str(path)

    return make


@pytest.mark.parametrize("flag", ["--lora_weight", "--lora"])
@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ("truncated", "truncated"),
        ("wan", "lora_unet_blocks_0_self_attn_q"),
        ("shape", "lora_unet_transformer_blocks_0_attn_to_q.lora_up.weight"),
    ],
)
def test_a_lora_that_cannot_be_used_names_its_first_key(flag: str, kind: str, named: str, refused, bad) -> None:
    line = refused("--prompt", "猫", flag, bad(kind))
    assert line.startswith(flag) and named in line and f"{kind}.safetensors" in line


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--lora_weight", "none.safetensors"], "--lora_weight"),
        (["--lora", "none.safetensors:0.5"], "--lora: got none.safetensors"),
        (["--lora_multiplier", "1"], "--lora_multiplier: got 1 values for 0 LoRA files"),
        (["--sweep", "lora=0,1"], "--lora beside it"),
        (["--lora_multiplier", "much"], "--lora_multiplier: got much"),
        (["--save_merged_model", "x.safetensors"], "LoRAs to merge"),
        (["--save_merged_model", "x.safetensors", "--lora", "a"], "--lora: got a; expected --lora_weight"),
    ],
)
def test_options_that_cannot_work_are_named(argv: list[str], named: str, refused) -> None:
    assert named in refused("--prompt", "猫", *argv)


def test_every_bad_line_of_a_batch_is_named(refused, bad, tmp_path) -> None:
    (tmp_path / "行.txt").write_text(f"a\nb --lora {bad('wan')}\nc --lora {bad('shape')}\n", encoding="utf-8")
    said = refused("--from_file", str(tmp_path / "行.txt"), lines=2).splitlines()
    assert "行.txt line 2, --lora" in said[0] and "行.txt line 3, --lora" in said[1]
    (tmp_path / "行.txt").write_text("a\nb --lora none.safetensors\n", encoding="utf-8")
    assert "行.txt line 2, --lora: got none.safetensors" in refused("--from_file", str(tmp_path / "行.txt"))
