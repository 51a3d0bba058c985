"""The parameters of a model by name and shape, from the config alone: nothing is allocated.

The one source for counting, seeded initial weights, checking files, choosing what is quantised or adapted, and memory
plans. Names and shapes are those of `transformers.MambaForCausalLM`; the MoE layers add `router` and `experts` under
`mixer`.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from magellano.names import FinalNorm, Gate, LayerKind, LoraKind, LoraTarget
from magellano.profile import LoraConfig, ModelConfig

EMBEDDING, HEAD = "backbone.embeddings.weight", "lm_head.weight"
SMALL_WEIGHT = 1 << 18  # values up to which training keeps an NF4 projection dense beside its codes


class Init(StrEnum):
    """How initial values are drawn (Gu & Dao 2023, arXiv 2312.00752, and its reference code)."""

    NORMAL = "normal"  # N(0, 1 / fan_in), times `scale`
    EMBEDDING = "embedding"  # N(0, 0.02)
    UNIFORM = "uniform"  # U(-b, b), b = scale / sqrt(fan_in)
    ONES = "ones"
    ZEROS = "zeros"
    A_LOG = "a_log"  # log(1 .. N) for every channel
    DT_BIAS = "dt_bias"  # softplus(value) log-uniform in [1e-3, 1e-1]


@dataclass(frozen=True)
class ParamSpec:
    """One parameter: its name in files, shape, initial distribution and part in QLoRA."""

    name: str
    shape: tuple[int, ...]
    init: Init = Init.NORMAL
    scale: float = 1.0
    target: LoraTarget | None = None  # the adapter that may sit on it; matrices with one are quantised

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def layer(self) -> int | None:
        """The number of the layer that it is in; None: in none."""
        return int(self.name.split(".")[2]) if self.name.startswith("backbone.layers.") else None

    @property
    def decays(self) -> bool:
        """Weight decay pulls on matrices only, not on norms, biases, A_log or D."""
        return self.target is not None or self.name.endswith("router.weight")


def parameters(config: ModelConfig) -> list[ParamSpec]:
    """Every parameter of the model in forward order."""
    vocabulary = (config.vocab_size, config.d_model)
    specs = [ParamSpec(EMBEDDING, vocabulary, Init.EMBEDDING, target=LoraTarget.HEAD if config.tied else None)]
    for layer in range(config.n_layers):
        specs += layer_parameters(config, layer)
    specs.append(ParamSpec("backbone.norm_f.weight", (config.d_model,), Init.ONES))
    if config.final_norm is FinalNorm.LAYER:
        specs.append(ParamSpec("backbone.norm_f.bias", (config.d_model,), Init.ZEROS))
    return specs if config.tied else [*specs, ParamSpec(HEAD, vocabulary, target=LoraTarget.HEAD)]


def layer_parameters(config: ModelConfig, layer: int) -> Iterator[ParamSpec]:
    """The parameters of layer `layer` (from 0)."""
    at = f"backbone.layers.{layer}"
    yield ParamSpec(f"{at}.norm.weight", (config.d_model,), Init.ONES)
    yield from (_mamba if config.kind(layer) is LayerKind.MAMBA else _moe)(config, f"{at}.mixer")


def _mamba(c: ModelConfig, at: str) -> Iterator[ParamSpec]:
    d, i, n, r, k = c.d_model, c.d_inner, c.d_state, c.dt_rank, c.d_conv
    yield ParamSpec(f"{at}.in_proj.weight", (2 * i, d), target=LoraTarget.IN_PROJ)
    yield ParamSpec(f"{at}.conv1d.weight", (i, 1, k), Init.UNIFORM)
    yield ParamSpec(f"{at}.conv1d.bias", (i,), Init.UNIFORM, scale=1 / math.sqrt(k))
    yield ParamSpec(f"{at}.x_proj.weight", (r + 2 * n, i), target=LoraTarget.X_PROJ)
    yield ParamSpec(f"{at}.dt_proj.weight", (i, r), Init.UNIFORM, target=LoraTarget.DT_PROJ)
    yield ParamSpec(f"{at}.dt_proj.bias", (i,), Init.DT_BIAS)
    yield ParamSpec(f"{at}.A_log", (i, n), Init.A_LOG)
    yield ParamSpec(f"{at}.D", (i,), Init.ONES)
    yield ParamSpec(f"{at}.out_proj.weight", (d, i), scale=1 / math.sqrt(c.n_layers), target=LoraTarget.OUT_PROJ)


def _moe(c: ModelConfig, at: str) -> Iterator[ParamSpec]:
    e, d, f = c.n_experts, c.d_model, c.d_ff
    yield ParamSpec(f"{at}.router.weight", (e, d))
    if c.gate is Gate.SIGMOID:
        yield ParamSpec(f"{at}.router.bias", (e,), Init.ZEROS)
    yield ParamSpec(f"{at}.experts.w1.weight", (e, c.d_up, d), target=LoraTarget.W1)
    yield ParamSpec(f"{at}.experts.w2.weight", (e, d, f), scale=1 / math.sqrt(c.n_layers), target=LoraTarget.W2)


def count(config: ModelConfig) -> int:
    """Parameters of the base."""
    return sum(spec.size for spec in parameters(config))


def lora_shapes(spec: ParamSpec, lora: LoraConfig) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Shapes of A [.., r, in] and B [.., out, r] on `spec`, or None where `lora` leaves it alone."""
    if spec.target is None or spec.target not in lora.targets:
        return None
    *experts, out, inner = spec.shape
    rank = lora.rank_of(spec.target, spec.layer)
    return (*experts, rank, inner), (*experts, out, rank)


def adapter_shapes(spec: ParamSpec, lora: LoraConfig) -> dict[str, tuple[int, ...]]:
    """The arrays of the adapter on `spec` by name; none where `lora` leaves it alone."""
    pair = lora_shapes(spec, lora)
    if pair is None:
        return {}
    magnitude = {"lora_m": spec.shape[:-1] if len(spec.shape) == 2 else (*spec.shape[:-1], 1)}
    return {"lora_a": pair[0], "lora_b": pair[1], **(magnitude if lora.kind is LoraKind.DORA else {})}


def lora_count(config: ModelConfig, lora: LoraConfig) -> int:
    """Parameters that train in a fine-tune."""
    return sum(math.prod(shape) for spec in parameters(config) for shape in adapter_shapes(spec, lora).values())
