"""UMT5 against transformers' whole model, from every layout of its file."""

import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel, UMT5Model

from common.weights import check_names_and_shapes
from demo.small_tokenizers import save_t5_tokenizer
from modules.fp8 import Fp8Linear
from options.errors import UserError
from tests.published import described, published_shapes
from wan import text_encoder as ours

PROMPT = "A girl in a school uniform walks, 猫がこちらを見ています"
VOCABULARY = 800
# The published table, from transformers' names to the official ones.
BLOCK = r"encoder\.block\.(\d+)\.layer\."
OFFICIAL = [
    (r"shared\.", "token_embedding."),
    (r"encoder\.final_layer_norm\.", "norm."),
    (BLOCK + r"0\.layer_norm\.", r"blocks.\1.norm1."),
    (BLOCK + r"1\.layer_norm\.", r"blocks.\1.norm2."),
    (BLOCK + r"0\.SelfAttention\.([qkvo])\.", r"blocks.\1.attn.\2."),
    (
        BLOCK + r"0\.SelfAttention\.relative_attention_bias\.",
        r"blocks.\1.pos_embedding.embedding.",
    ),
    (BLOCK + r"1\.DenseReluDense\.wi_0\.", r"blocks.\1.ffn.gate.0."),
    (BLOCK + r"1\.DenseReluDense\.wi_1\.", r"blocks.\1.ffn.fc1."),
    (BLOCK + r"1\.DenseReluDense\.wo\.", r"blocks.\1.ffn.fc2."),
]


def umt5(**changes) -> UMT5EncoderModel:
    torch.manual_seed(0)
    sizes = {"d_model": 64, "d_ff": 96, "d_kv": 64, "num_heads": 2, "num_layers": 3, "vocab_size": VOCABULARY}
    model = UMT5EncoderModel(UMT5Config(**{**sizes, **changes})).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        spread = 1.0 if "relative_attention_bias" in name else 0.03
        parameter.data += spread * torch.randn_like(parameter)
    return model


def tensors_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.contiguous() for name, tensor in model.state_dict().items()}


def official(model: UMT5EncoderModel) -> dict[str, torch.Tensor]:
    def renamed(name: str) -> str:
        return next(re.sub(pattern, new, name) for pattern, new in OFFICIAL if re.match(pattern, name))

    return {renamed(n): t for n, t in tensors_of(model).items() if n != "encoder.embed_tokens.weight"}


@pytest.fixture(scope="module")
def reference() -> UMT5EncoderModel:
    return umt5()


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer") / "google" / "umt5-xxl"
    assert save_t5_tokenizer(folder) <= VOCABULARY
    return folder


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: Path):
    return AutoTokenizer.from_pretrained(tokenizer_folder)


def saved(folder: Path, tensors: dict[str, torch.Tensor], name: str = "umt5.safetensors") -> Path:
    save_file(tensors, folder / name)
    return folder / name


def load(path: Path, **options):
    return ours.load_t5(ours.open_t5(path), dtype=torch.float32, device="cpu", **options)


def padded_rows(model: UMT5EncoderModel, tokenizer, text: str) -> torch.Tensor:
    """As the official pipeline: 512 tokens with a mask, of which the valid ones are kept."""
    batch = tokenizer(text, padding="max_length", truncation=True, max_length=512, return_tensors="pt")
    rows = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    return rows[0, : int(batch["attention_mask"].sum())]


def assert_close(found: torch.Tensor, wanted: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() <= tolerance * wanted.abs().max()


# A prompt's rows


@pytest.mark.parametrize("prompt", [PROMPT, "", "cat", "the long walk, " * 30, "x" * 511])
def test_equals_transformers_with_padding_and_its_mask(reference, tokenizer, tmp_path: Path, prompt: str) -> None:
    found = ours.encode_t5(load(saved(tmp_path, official(reference))), tokenizer, prompt)
    assert_close(found, padded_rows(reference, tokenizer, ours.clean_prompt(prompt)))
    assert not found.requires_grad


def test_rows_depend_on_the_order_and_distance_of_words(reference, tokenizer, tmp_path: Path) -> None:
    """Else the comparison would say nothing about position biases."""
    model = load(saved(tmp_path, official(reference)))
    cat, far = ours.encode_t5(model, tokenizer, "cat"), ours.encode_t5(model, tokenizer, "cat" + " red" * 40)
    assert (cat[0] - far[0]).abs().max() > 0.01


def test_a_prompt_that_is_too_long_is_cut_before_its_end_token(
    reference, tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    ids = ours.prompt_tokens(tokenizer, "!" * 511)
    assert len(ids) == 512 and not caplog.records
    assert ours.prompt_tokens(tokenizer, "!" * 600) == ids and ids[-1] == tokenizer.eos_token_id
    message = "the prompt has 600 tokens; the first 511 are used"
    assert [record.getMessage() for record in caplog.records] == [message]
    model = load(saved(tmp_path, official(reference)))
    found = ours.encode_t5(model, tokenizer, "!" * 600)
    assert_close(found, padded_rows(reference, tokenizer, "!" * 600))


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("  two\n\n lines\t and\u3000spaces ", "two lines and spaces"),
        ("fish &amp;amp; chips &amp;lt;hot&amp;gt;", "fish & chips <hot>"),
        ("<b> &amp;amp;amp;", "<b> &amp;"),  # twice, not until nothing is left
        ("voilÃ  le chÃ¢teau", "voilà le château"),
        ("“quoted”, ﬁne", '"quoted", fine'),
        ("猫が、こちらを見ています。", "猫が、こちらを見ています。"),
        ("", ""),
    ],
)
def test_cleaning(text: str, wanted: str) -> None:
    assert ours.clean_prompt(text) == wanted


def test_cleaning_equals_diffusers() -> None:
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean

    for text in (
        PROMPT,
        " a\u00a0 b &quot;c&quot;",
        "色调艳丽，过曝，静态\u2028细节&hellip;",
        "a\x0bb\x1cc",
        "&amp;nbsp; x ",
    ):
        assert ours.clean_prompt(text) == prompt_clean(text)


def test_prompts_are_cleaned_before_they_are_read(tokenizer) -> None:
    assert ours.prompt_tokens(tokenizer, " a  &amp;\n cat ") == tokenizer("a & cat")["input_ids"]


def test_types(reference, tokenizer, tmp_path: Path) -> None:
    checkpoint = ours.open_t5(saved(tmp_path, official(reference)))
    model = ours.load_t5(checkpoint, dtype=torch.bfloat16, device="cpu")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    found = ours.encode_t5(model, tokenizer, PROMPT)
    assert found.dtype == torch.bfloat16
    assert_close(found.float(), padded_rows(reference, tokenizer, ours.clean_prompt(PROMPT)), 0.05)


# Layouts


def official_pickle(folder: Path, model: UMT5EncoderModel) -> Path:
    path = folder / "\u91cd\u307f models_t5_umt5-xxl-enc-bf16.pth"
    torch.save(official(model), path)
    return path


def official_with_prefix(folder: Path, model: UMT5EncoderModel) -> Path:
    return saved(folder, {f"encoder.{name}": tensor for name, tensor in official(model).items()})


def official_file(folder: Path, model: UMT5EncoderModel) -> Path:
    return saved(folder, official(model))


def comfyui_file(folder: Path, model: UMT5EncoderModel) -> Path:
    tensors = {n: t for n, t in tensors_of(model).items() if n != "encoder.embed_tokens.weight"}
    return saved(folder, tensors | {"spiece_model": torch.zeros(9, dtype=torch.uint8)}, "umt5_xxl_fp16.safetensors")


def snapshot(folder: Path, model: UMT5EncoderModel) -> Path:
    model.save_pretrained(folder / "text_encoder")
    return folder


def shards(folder: Path, model: UMT5EncoderModel) -> Path:
    model.save_pretrained(folder / "text_encoder", max_shard_size="200KB")
    return next((folder / "text_encoder").glob("model-00002-of-*.safetensors"))


def both_embeddings(folder: Path, model: UMT5EncoderModel) -> Path:
    return saved(folder, {name: tensor.clone() for name, tensor in tensors_of(model).items()})


def with_decoder(folder: Path, model: UMT5EncoderModel) -> Path:
    whole = UMT5Model(UMT5Config(**{**model.config.to_dict(), "num_decoder_layers": 1}))
    whole.load_state_dict(model.state_dict(), strict=False)
    tensors = {n: t for n, t in tensors_of(whole).items() if not n.endswith(".embed_tokens.weight")}
    return saved(folder, tensors | {"lm_head.weight": torch.zeros(2)})


FORMS = [official_pickle, official_file, official_with_prefix, comfyui_file, snapshot, shards, both_embeddings]


@pytest.mark.parametrize("form", [*FORMS, with_decoder])
def test_forms(reference, tokenizer, tmp_path: Path, form: Callable[[Path, UMT5EncoderModel], Path]) -> None:
    model = load(form(tmp_path, reference))
    assert model.state_dict().keys() == reference.encoder.state_dict().keys()
    assert_close(ours.encode_t5(model, tokenizer, PROMPT), padded_rows(reference, tokenizer, ours.clean_prompt(PROMPT)))


def test_the_published_size() -> None:
    shapes = {ours._transformers_name(name): shape for name, shape in published_shapes("wan_umt5").items()}
    checkpoint = described("--t5", shapes, "BF16")
    model = ours.build_t5(checkpoint)
    check_names_and_shapes(model, checkpoint)
    assert len(shapes) == 242 and model.config.d_kv == model.config.num_heads == 64
    config = {"d_model": 4096, "d_ff": 10240, "num_layers": 24, "vocab_size": 256384, "dense_act_fn": "gelu_new"}
    assert {key: getattr(model.config, key) for key in config} == config


def test_what_shapes_do_not_tell_comes_from_the_config(tokenizer, tmp_path: Path) -> None:
    whole = umt5(relative_attention_max_distance=20, layer_norm_epsilon=0.1, relative_attention_num_buckets=16)
    prompt = "the cat " * 30
    wanted = padded_rows(whole, tokenizer, ours.clean_prompt(prompt))
    assert_close(ours.encode_t5(load(snapshot(tmp_path, whole)), tokenizer, prompt), wanted)
    config = tmp_path / "text_encoder" / "config.json"
    config.write_text(json.dumps({"model_type": "other", "layer_norm_epsilon": 9}), encoding="utf-8")
    assert load(tmp_path).config.layer_norm_epsilon == 1e-6


# 8 bits


@pytest.mark.parametrize("fp8", [False, True])
def test_fp8_linears_compute_in_the_type_of_the_activations(tokenizer, tmp_path: Path, fp8: bool) -> None:
    whole = umt5(d_ff=128)
    model = load(saved(tmp_path, official(whole)), fp8=fp8)
    linears = {name for name, module in model.named_modules() if isinstance(module, Fp8Linear)}
    assert len(linears) == (3 * 7 if fp8 else 0)
    assert model.embed_tokens.weight.dtype == torch.float32
    found = ours.encode_t5(model, tokenizer, PROMPT)
    with torch.no_grad():  # the weights that the codes stand for, in transformers' own layers
        for name in linears:
            linear = model.get_submodule(name)
            scale = linear.scale_weight.float().repeat_interleave(64, dim=1).squeeze(-1)
            whole.encoder.get_submodule(name).weight.copy_(linear.weight.float() * scale)
    assert_close(found, padded_rows(whole, tokenizer, ours.clean_prompt(PROMPT)))


def comfyui_scaled(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """One scale for a weight, a mark, and the tokenizer: as umt5_xxl_fp8_e4m3fn_scaled.safetensors."""
    made = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn), "spiece_model": torch.zeros(9, dtype=torch.uint8)}
    for name, tensor in tensors.items():
        if re.search(r"SelfAttention\.[qkvo]\.|DenseReluDense", name):
            scale = tensor.abs().max() / 448
            made[name] = (tensor / scale).to(torch.float8_e4m3fn)
            made[name.removesuffix("weight") + "scale_weight"] = scale
        elif name != "encoder.embed_tokens.weight":
            made[name] = tensor
    return made


def bare_cast(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.to(torch.float8_e4m3fn) for name, tensor in tensors.items()}


def test_comfyuis_scaled_file(reference, tokenizer, tmp_path: Path) -> None:
    tensors = comfyui_scaled(tensors_of(reference))
    model = load(saved(tmp_path, tensors))
    assert sum(isinstance(module, Fp8Linear) for module in model.modules()) == 3 * 7
    opened = {
        name: tensor.float() * tensors.get(name.removesuffix("weight") + "scale_weight", torch.tensor(1.0))
        for name, tensor in tensors.items()
        if name.endswith(".weight")
    }
    whole = umt5()
    whole.load_state_dict(opened | {"encoder.embed_tokens.weight": opened["shared.weight"]})
    wanted = padded_rows(whole, tokenizer, ours.clean_prompt(PROMPT))
    assert_close(ours.encode_t5(model, tokenizer, PROMPT), wanted)


def test_a_bare_cast_of_the_official_file(reference, tokenizer, tmp_path: Path) -> None:
    model = load(saved(tmp_path, bare_cast(official(reference))))
    whole = umt5()
    whole.load_state_dict({name: t.to(torch.float8_e4m3fn).float() for name, t in tensors_of(whole).items()})
    wanted = padded_rows(whole, tokenizer, ours.clean_prompt(PROMPT))
    assert_close(ours.encode_t5(model, tokenizer, PROMPT), wanted)


# Wrong files


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("norm.weight", None, r"no final_layer_norm\.weight \(1 missing of"),
        ("token_embedding.weight", None, r"31 tensors without embed_tokens\.weight"),
        ("blocks.2.attn.k.weight", None, r"no block\.2\.layer\.0\.SelfAttention\.k\.weight"),
        ("blocks.0.attn.q.bias", torch.zeros(128), r"1 unexpected tensors, block\.0\.layer\.0\.SelfAttention\.q\.bias"),
        ("blocks.1.ffn.fc1.weight", torch.zeros(96, 63), r"block\.1\.layer\.1\.DenseReluDense\.wi_1\.weight of shape"),
    ],
)
def test_broken_files(reference, tmp_path: Path, name: str, tensor: torch.Tensor | None, message: str) -> None:
    tensors = {key: value for key, value in (official(reference) | {name: tensor}).items() if value is not None}
    with pytest.raises(UserError, match=rf"--t5 .*umt5\.safetensors: got {message}"):
        load(saved(tmp_path, tensors))


def test_other_models_files(tmp_path: Path) -> None:
    t5 = T5EncoderModel(T5Config(d_model=8, d_ff=8, d_kv=4, num_heads=2, num_layers=2, vocab_size=9))
    tensors = {n: t for n, t in tensors_of(t5).items() if n != "encoder.embed_tokens.weight"}
    with pytest.raises(UserError, match="a T5 text encoder; expected a UMT5 text encoder; check the path"):
        ours.open_t5(saved(tmp_path, tensors))
    names = ("visual.transformer.0.attn.to_qkv.weight", "visual.cls_embedding")
    with pytest.raises(UserError, match="a CLIP image encoder; expected a UMT5 text encoder; .* belongs to --clip"):
        ours.open_t5(saved(tmp_path, {name: torch.zeros(1) for name in names}))


# The tokenizer


def test_tokenizers_from_both_snapshots(reference, tokenizer_folder: Path, tmp_path: Path) -> None:
    home = tmp_path / "\u30e2\u30c7\u30eb"
    shutil.copytree(tokenizer_folder, home / "official" / "google" / "umt5-xxl")
    shutil.copytree(tokenizer_folder, home / "diffusers" / "tokenizer")
    file, folder = saved(home / "official", official(reference)), snapshot(home / "diffusers", reference)
    for path, wanted in ((file, home / "official/google/umt5-xxl"), (folder, home / "diffusers/tokenizer")):
        checkpoint = ours.open_t5(path)
        assert Path(ours.find_tokenizer(given=None, checkpoint=checkpoint)) == wanted
        assert ours.load_tokenizer(given=None, checkpoint=checkpoint)("")["input_ids"] == [1]
        assert Path(ours.find_tokenizer(given=str(home / "official"), checkpoint=checkpoint)) == (
            home / "official/google/umt5-xxl"
        )
    checkpoint = ours.open_t5(saved(tmp_path, official(reference)))
    hub = "Wan-AI/Wan2.1-T2V-14B/google/umt5-xxl"
    assert ours.find_tokenizer(given=None, checkpoint=checkpoint) == hub
    with pytest.raises(UserError, match="--t5_tokenizer: .*expected a folder with a tokenizer"):
        ours.find_tokenizer(given=str(tmp_path), checkpoint=checkpoint)


def test_the_tokenizer_on_the_hub(reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def unreachable(name: str, **options):
        asked.append((name, options["subfolder"]))
        raise OSError("no network")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", unreachable)
    with pytest.raises(UserError, match="^--t5_tokenizer: .*no network"):
        ours.load_tokenizer(given=None, checkpoint=ours.open_t5(saved(tmp_path, official(reference))))
    assert asked == [("Wan-AI/Wan2.1-T2V-14B", "google/umt5-xxl")]


def test_a_tokenizer_with_more_tokens_than_the_encoder(tokenizer_folder: Path, tmp_path: Path) -> None:
    checkpoint = ours.open_t5(saved(tmp_path, official(umt5(vocab_size=100))))
    with pytest.raises(UserError, match=r"--t5_tokenizer: .* tokens; expected at most the 100 of "):
        ours.load_tokenizer(given=str(tokenizer_folder), checkpoint=checkpoint)
