"""How long a training step of a FramePack LoRA takes, and how much memory, by the number of checkpointed blocks.

    python -m benchmarks.training --size 384 --steps 5
    python -m benchmarks.training --dit FramePackI2V_HY_bf16.safetensors --size 1024 --mixed_precision bf16
    python -m benchmarks.training --double_blocks 20 --single_blocks 40 --width 3072 --mixed_precision bf16

Without --dit it writes a transformer of random weights: time and memory do not depend on their values. A step is what
training does with a batch: noise, forward, backward, clipping, AdamW. Every number of blocks gets a process of its own,
so that peaks are its own too; numbers take turns, so that a machine that grows slower does so for all of them.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from benchmarks.memory import MemoryWatch
from common.flags import parse as parse_flags
from common.flags import run_script  # noqa: F401
