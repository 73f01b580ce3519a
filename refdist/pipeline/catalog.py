"""The models and devices of the study, by name."""

from dataclasses import dataclass
from typing import TypeVar

from refdist.pipeline.models import GroupedQueryAttention, LatentAttention, Model

_T = TypeVar("_T")
_MIB = 2**20


@dataclass(frozen=True)
class Device:
    """A GPU or another processor, with the numbers for the roofline.

    Attributes:
        name: name of the device.
        memory_bytes: memory that its driver reports.
        flops_per_second: peak of dense matrix products in bfloat16, with sums in float32.
        fp8_flops_per_second: the same in FP8; None if the device has no FP8 products.
        bytes_per_second: peak bandwidth of its memory.
        source: source of the numbers.
    """

    name: str
    memory_bytes: float
    flops_per_second: float
    fp8_flops_per_second: float | None
    bytes_per_second: float
    source: str


_LLAMA_VOCABULARY = 128256
_MODELS = [
    Model(
        "llama-3.1-8b", 32, 4096, 14336, GroupedQueryAttention(32, 8, 128), _LLAMA_VOCABULARY,
        published_parameters=8_030_261_248, source="meta-llama/Llama-3.1-8B, config.json",
    ),
    Model(
        "llama-3.1-70b", 80, 8192, 28672, GroupedQueryAttention(64, 8, 128), _LLAMA_VOCABULARY,
        published_parameters=70_553_706_496, source="meta-llama/Llama-3.1-70B, config.json",
    ),
    Model(
        "llama-3.1-405b", 126, 16384, 53248, GroupedQueryAttention(128, 8, 128), _LLAMA_VOCABULARY,
        published_parameters=405_853_388_800, source="meta-llama/Llama-3.1-405B, config.json",
    ),
    Model(
        "qwen3-32b", 64, 5120, 25600, GroupedQueryAttention(64, 8, 128, head_norms=True), 151936,
        published_parameters=32_762_123_264, source="Qwen/Qwen3-32B, config.json",
    ),
    Model(
        "mistral-large-2407", 88, 12288, 28672, GroupedQueryAttention(96, 8, 128), 32768,
        published_parameters=122_610_069_504,
        source="mistralai/Mistral-Large-Instruct-2407, config.json",
    ),
    Model(
        "phi-4", 40, 5120, 17920, GroupedQueryAttention(40, 10, 128), 100352,
        published_parameters=14_659_507_200, source="microsoft/phi-4, config.json",
    ),
    Model(
        "gemma-3-27b", 62, 5376, 21504, GroupedQueryAttention(32, 16, 128, head_norms=True), 262208,
        tied_embeddings=True, norms_per_layer=4, published_parameters=27_009_346_304,
        source="google/gemma-3-27b-it, text_config of config.json; without the vision tower, and "
        "with all layers global, although five of six look back over 1024 tokens only",
    ),
    Model(
        "mixtral-8x7b", 32, 4096, 14336, GroupedQueryAttention(32, 8, 128), 32000,
        num_experts=8, experts_per_token=2, published_parameters=46_702_792_704,
        source="mistralai/Mixtral-8x7B-v0.1, config.json",
    ),
    Model(
        "qwen3-235b-a22b", 94, 4096, 1536, GroupedQueryAttention(64, 4, 128, head_norms=True),
        151936, num_experts=128, experts_per_token=8, published_parameters=235_093_634_560,
        source="Qwen/Qwen3-235B-A22B, config.json",
    ),
    Model(
        "deepseek-v3", 61, 7168, 2048, LatentAttention(128, 1536, 512, 128, 64, 128), 129280,
        num_experts=256, experts_per_token=8, shared_experts=1, dense_layers=3,
        dense_intermediate_size=18432, router_bias=True, published_parameters=671_026_419_200,
        source="deepseek-ai/DeepSeek-V3, config.json; without the module for multi-token "
        "prediction",
    ),
]  # fmt: skip

_NVIDIA = "NVIDIA's data sheet, dense; memory as nvidia-smi shows it"
_DEVICES = [
    Device("l4", 23034 * _MIB, 121e12, 242.5e12, 300e9, _NVIDIA),
    Device("rtx-4090", 24564 * _MIB, 165.2e12, 330.3e12, 1008e9, _NVIDIA),
    Device("l40s", 46068 * _MIB, 362.05e12, 733e12, 864e9, _NVIDIA),
    Device("a100-80gb", 81920 * _MIB, 312e12, None, 2039e9, f"{_NVIDIA}; SXM"),
    Device("h100", 81559 * _MIB, 989.4e12, 1978.9e12, 3350e9, f"{_NVIDIA}; SXM"),
    Device("h200", 143771 * _MIB, 989.4e12, 1978.9e12, 4800e9, f"{_NVIDIA}; SXM"),
    Device("b200", 183359 * _MIB, 2250e12, 4500e12, 8000e9, f"{_NVIDIA}; a GPU of DGX B200"),
    Device("mi300x", 192 * 2**30, 1307.4e12, 2614.9e12, 5300e9, "AMD's data sheet, dense"),
]

MODELS = {model.name: model for model in _MODELS}
"""The models, by name."""

DEVICES = {device.name: device for device in _DEVICES}
"""The devices, by name."""


def find_model(name: str) -> Model:
    """The model of that name.

    Raises:
        ValueError: no model has this name; the text lists all names.
    """
    return _find(MODELS, "model", name)


def find_device(name: str) -> Device:
    """The device of that name.

    Raises:
        ValueError: no device has this name; the text lists all names.
    """
    return _find(DEVICES, "device", name)


def _find(known: dict[str, _T], what: str, name: str) -> _T:
    if name not in known:
        raise ValueError(f"{what}={name!r}: must be one of {', '.join(known)}")
    return known[name]
