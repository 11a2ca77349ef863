"""The official layouts of Wan2.1's VAE and encoders at any size: what a file holds, by name and shape."""

from collections.abc import Iterator

Shapes = dict[str, tuple[int, ...]]

MULTIPLES = (1, 2, 4, 4)
"""Widths of the VAE's stages, of its smallest."""
HALVES_FRAMES = (False, True, True)
NUM_ENCODER_BLOCKS, NUM_DECODER_BLOCKS = 2, 3
COLOURS = 3
BUCKETS = 32
"""Distances between words that UMT5 tells apart."""
PATCH = 14


def vae_shapes(base: int, channels: int = 16) -> Shapes:
    """Of Wan2.1_VAE.pth with stages of `base` times 1, 2, 4 and 4; published is 96."""
    widths = [base * multiple for multiple in MULTIPLES]
    encoder = {**_conv("conv1", COLOURS, widths[0]), **_downsamples(widths), **_middle(widths[-1])}
    encoder |= _head(widths[-1], 2 * channels)
    decoder = {**_conv("conv1", channels, widths[-1]), **_middle(widths[-1]), **_upsamples(widths[::-1])}
    decoder |= _head(widths[0], COLOURS)
    return {
        **{f"encoder.{name}": shape for name, shape in encoder.items()},
        **_conv("conv1", 2 * channels, 2 * channels, 1, 1, 1),
        **_conv("conv2", channels, channels, 1, 1, 1),
        **{f"decoder.{name}": shape for name, shape in decoder.items()},
    }


def _conv(name: str, inputs: int, outputs: int, *kernel: int) -> Shapes:
    return {f"{name}.weight": (outputs, inputs, *(kernel or (3, 3, 3))), f"{name}.bias": (outputs,)}


def _residual(name: str, inputs: int, outputs: int) -> Shapes:
    block = {f"{name}.residual.0.gamma": (inputs, 1, 1, 1), **_conv(f"{name}.residual.2", inputs, outputs)}
    block |= {f"{name}.residual.3.gamma": (outputs, 1, 1, 1), **_conv(f"{name}.residual.6", outputs, outputs)}
    return block | (_conv(f"{name}.shortcut", inputs, outputs, 1, 1, 1) if inputs != outputs else {})


def _middle(width: int) -> Shapes:
    attention = {"middle.1.norm.gamma": (width, 1, 1), **_conv("middle.1.to_qkv", width, 3 * width, 1, 1)}
    attention |= _conv("middle.1.proj", width, width, 1, 1)
    return {**_residual("middle.0", width, width), **attention, **_residual("middle.2", width, width)}


def _head(width: int, outputs: int) -> Shapes:
    return {"head.0.gamma": (width, 1, 1, 1), **_conv("head.2", width, outputs)}


def _downsamples(widths: list[int]) -> Shapes:
    layers: list[Shapes] = []
    inputs = widths[0]
    for stage, width in enumerate(widths):
        for _ in range(NUM_ENCODER_BLOCKS):
            layers.append(_residual("", inputs, width))
            inputs = width
        if stage < len(HALVES_FRAMES):
            time = _conv(".time_conv", width, width, 3, 1, 1) if HALVES_FRAMES[stage] else {}
            layers.append(_conv(".resample.1", width, width, 3, 3) | time)
    return dict(_numbered("downsamples", layers))


def _upsamples(widths: list[int]) -> Shapes:
    """Each enlargement halves the width as well."""
    layers: list[Shapes] = []
    inputs = widths[0]
    for stage, width in enumerate(widths):
        for _ in range(NUM_DECODER_BLOCKS):
            layers.append(_residual("", inputs, width))
            inputs = width
        if stage < len(HALVES_FRAMES):
            doubles_frames = HALVES_FRAMES[-1 - stage]
            time = _conv(".time_conv", width, 2 * width, 3, 1, 1) if doubles_frames else {}
            layers.append(_conv(".resample.1", width, width // 2, 3, 3) | time)
            inputs = width // 2
    return dict(_numbered("upsamples", layers))


def _numbered(name: str, layers: list[Shapes]) -> Iterator[tuple[str, tuple[int, ...]]]:
    for number, layer in enumerate(layers):
        for rest, shape in layer.items():
            yield f"{name}.{number}{rest}", shape


def t5_shapes(*, vocabulary: int, width: int, inner: int, mlp: int, heads: int, blocks: int) -> Shapes:
    """Of models_t5_umt5-xxl-enc-bf16.pth; published are 256384, 4096, 4096, 10240, 64 and 24."""
    shapes: Shapes = {"token_embedding.weight": (vocabulary, width)}
    for i in range(blocks):
        block = {"norm1": (width,), **{f"attn.{name}": (inner, width) for name in "qkv"}, "attn.o": (width, inner)}
        block |= {"norm2": (width,), "ffn.gate.0": (mlp, width), "ffn.fc1": (mlp, width), "ffn.fc2": (width, mlp)}
        block |= {"pos_embedding.embedding": (BUCKETS, heads)}
        shapes |= {f"blocks.{i}.{name}.weight": shape for name, shape in block.items()}
    return shapes | {"norm.weight": (width,)}


def clip_shapes(*, width: int, mlp: int, blocks: int, head: int, grid: int = 16) -> Shapes:
    """Of the image half of models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth; published are 1280, 5120, 32, 1024.

    Args:
        grid: patches per side of a picture.
    """
    shapes: Shapes = {"cls_embedding": (1, 1, width), "pos_embedding": (1, grid**2 + 1, width), "head": (width, head)}
    shapes |= {"patch_embedding.weight": (width, COLOURS, PATCH, PATCH)} | _with_bias("pre_norm", width)
    for i in range(blocks):
        place = f"transformer.{i}"
        shapes |= _with_bias(f"{place}.norm1", width) | _with_bias(f"{place}.attn.to_qkv", 3 * width, width)
        shapes |= _with_bias(f"{place}.attn.proj", width, width) | _with_bias(f"{place}.norm2", width)
        shapes |= _with_bias(f"{place}.mlp.0", mlp, width) | _with_bias(f"{place}.mlp.2", width, mlp)
    shapes |= _with_bias("post_norm", width)
    return {f"visual.{name}": shape for name, shape in shapes.items()}


def _with_bias(name: str, *shape: int) -> Shapes:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
