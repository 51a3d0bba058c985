"""One token for each of a few sequences: the model as a recurrence with few launches, each product straight from the
packed weights with the norm before it and the adapter, the activation and the residual after it (ops/around.py).

Shapes: B sequences, D d_model, I d_inner, N d_state, R dt_rank, V vocabulary, k experts per token.
"""

import functools
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, cast

from magellano.backend import mx, tree_flatten
from magellano.linear import Adapted, Embedding, ExpertProjection, Projection, merged
from magellano.mamba import DtProjection, Mamba, MambaState
from magellano.moe import MoE
from magellano.names import FinalNorm, Gate
from magellano.nf4 import NF4Stack, NF4Tensor
from magellano.ops import cuda, launch, selective_scan
from magellano.ops.around import Around
from magellano.ops.chain import Chain, columns
from magellano.ops.decode import conv_step, matvec, nf4_rows
from magellano.ops.experts import Layer as ExpertLayer
from magellano.ops.experts import feed_forward_few
from magellano.ops.launch import Dialect
from magellano.ops.moe import route
from magellano.ops.nf4 import BLOCK, GPU_ROWS, HOST_ROWS, nf4_matvec

if TYPE_CHECKING:
    from magellano.model import Layer, MagellanoLM, RMSNorm

State = list[MambaState | None]
Step = Callable[[mx.array, MambaState | None], tuple[mx.array, MambaState | None]]  # of a layer: h_BD and its state
# What one launch of all layers can serve: its phases' threadgroup memory adds up and may be 48 KiB, twice a processor,
# and its arguments 32,764 bytes, of which the arrays of 160 layers with adapters took 30,048.
CHAINED_EXPERTS, CHAINED_STATES, CHAINED_LAYERS, CHAINED_FORMS = 32, 64, 128, 2
_SMALL = 1 << 19  # values: an NF4 matrix up to this size is held dense, its adapter added, while decoding


class Decoder:
    """`decoder(tokens_B, state) -> (logits_BV float32, state)`, for as many sequences at a time as `serves` says.

    Small matrices are made dense once, here; everything else is read as the model holds it, so the model must not
    change while this is in use. `chained`: whether the layers are one launch (ops/chain.py), by default as the device
    and the model allow.
    """

    def __init__(self, model: "MagellanoLM", chained: bool | None = None):
        self.model = model
        codes = any(_from_codes(m) for _, m in model.named_modules() if isinstance(m, Adapted))
        self.rows = HOST_ROWS if codes and not launch.gpu_geometry() else GPU_ROWS
        self.embeddings, self.head = _merged(model.backbone.embeddings), _merged(model.head)
        self.steps = [_mamba(x) if isinstance(x.mixer, Mamba) else _moe(x) for x in model.backbone.layers]
        self.single = _single(model) if chained is None else None if chained else "asked for"
        self._chains: dict[tuple[tuple[tuple[int, ...], mx.Dtype], ...], Chain] = {}

    def serves(self, batch: int) -> bool:
        """Whether few rows are so few that this is faster than `MagellanoLM.step`, which makes weights dense."""
        return batch <= self.rows

    def __call__(self, tokens_B: mx.array, state: State) -> tuple[mx.array, State]:
        h_BD, *after = self._run(state, [self._embed(tokens_B), *flat(state)])
        return self._logits(h_BD), folded(after, state)

    def _run(self, like: State, arrays: list[mx.array]) -> list[mx.array]:
        """`_layers` of `arrays`; in one launch unless `single` says why not."""
        layers = functools.partial(_layers, self.steps, like)
        if self.single is not None:
            return layers(*arrays)
        key = tuple((a.shape, a.dtype) for a in arrays)  # a chain reads arrays as those that it was recorded with
        if key not in self._chains:
            self._chains[key] = Chain("layers", layers, arrays)
        return self._chains[key](*arrays)

    def reads(self) -> dict[str, int]:
        """Bytes that a token of one sequence must move, by part: the weights in use, the state there and back."""
        model, config = self.model, self.model.config
        found = {"weights in 4 bits": 0, "adapters": 0, "dense weights": 0}
        left = sum(array.nbytes for array in dict(tree_flatten(model.parameters())).values())
        for _, module in model.named_modules():
            if not isinstance(module, Adapted):
                continue
            share = config.top_k / config.n_experts if isinstance(module, ExpertProjection) else 1.0
            base, adapter = module.base, module.lora_a.nbytes + module.lora_b.nbytes if module.adapted else 0
            size = base.nbytes if not isinstance(base, NF4Stack) else sum(a.nbytes for a in base.arrays.values())
            left -= adapter + (size if isinstance(base, mx.array) else 0)
            if _merges(module):
                found["dense weights"] += int(4 * math.prod(base.shape) * share)
                continue
            found["dense weights" if isinstance(base, mx.array) else "weights in 4 bits"] += int(size * share)
            found["adapters"] += int(adapter * share)
        found["dense weights"] += left
        found["state"] = 2 * sum(array.nbytes for array in flat(model.initial_state(1)))
        return found

    def _embed(self, tokens_B: mx.array) -> mx.array:
        embedding, dtype = self.model.backbone.embeddings, self.model.compute
        if self.embeddings is not None:
            return self.embeddings[tokens_B].astype(dtype)
        base = embedding.base
        if isinstance(base, NF4Tensor) and base.shape[1] % BLOCK == 0:
            adapter = (embedding.lora_a, embedding.lora_b, embedding.lora_scale) if embedding.adapted else ()
            return nf4_rows(tokens_B, base.parts, base.shape[1], dtype, *adapter)
        return embedding(tokens_B[:, None]).squeeze(1).astype(dtype)

    def _logits(self, h_BD: mx.array) -> mx.array:
        final, norm = self.model.backbone.norm_f, Around()
        if self.model.config.final_norm is FinalNorm.RMS:
            norm = _norm(cast("RMSNorm", final))
        else:
            h_BD = final(h_BD)
        if self.head is not None:
            return matvec(h_BD, self.head, None, norm, mx.float32)
        return _adapted(self.model.head, h_BD, norm, mx.float32)


def _layers(steps: Sequence[Step], like: State, h_BD: mx.array, *arrays: mx.array) -> list[mx.array]:
    """Hidden states and state arrays after these layers, from those before; `like`: a state of the same layers."""
    new: State = []
    for step, old in zip(steps, folded(arrays, like), strict=True):
        h_BD, after = step(h_BD, old)
        new.append(after)
    return [h_BD, *flat(new)]


def _single(model: "MagellanoLM") -> str | None:
    """Why the layers cannot be one launch; None: they can."""
    config = model.config
    if launch.dialect() is not Dialect.CUDA:
        return f"the {launch.dialect()} dialect has no threadgroups that wait for one another"
    if os.environ.get("MLX_USE_CUDA_GRAPHS") != "0":
        return "in MLX's CUDA graphs two such launches could wait for each other"
    if int(cuda.architecture().removeprefix("sm_")) < 80:
        return "before compute capability 8.0 a processor may have too little memory for two of the threadgroups"
    if config.dt_norm_eps or config.d_conv == 1 or config.n_layers > CHAINED_LAYERS:
        return f"the model norms dt, B and C, has a convolution of one step, or more than {CHAINED_LAYERS} layers"
    if config.d_state > CHAINED_STATES or config.d_state & (config.d_state - 1):
        return f"the model's number of states is no power of two, or more than {CHAINED_STATES}"
    if config.hidden.gated or config.gate is not Gate.SOFTMAX or config.n_experts > CHAINED_EXPERTS:
        return f"the model's experts are gated, chosen in another way, or more than {CHAINED_EXPERTS}"
    for name, module in model.named_modules():
        if not isinstance(module, Adapted) or not name.startswith("backbone.layers"):
            continue
        if module.magnitude is not None:
            return f"{name} has a DoRA adapter"
        if _from_codes(module) and (module.base.shape[-1] % BLOCK or isinstance(module, DtProjection)):
            return f"{name} has rows that no kernel reads from their codes where they lie"
    if len({_form(layer) for layer in model.backbone.layers}) > CHAINED_FORMS:
        return f"the model's layers, or their adapters' ranks or scales, are of more than {CHAINED_FORMS} forms"
    return None


def _form(layer: "Layer") -> tuple[object, ...]:
    """What decides which texts a layer's phases are: layers that differ in it are phases of their own."""
    found: list[object] = []
    for name, module in layer.named_modules():
        if isinstance(module, Adapted):
            rank, scale = (module.lora_a.shape[-2], module.lora_scale) if module.adapted else (0, 0.0)
            merges = _merges(module)  # the adapter is then in the matrix
            found.append((name, type(module.base), merges, *(() if merges else (rank, scale))))
    return tuple(sorted(found, key=str))


def _norm(norm: "RMSNorm") -> Around:
    return Around(norm_I=norm.weight, eps=norm.eps)


def _mamba(layer: "Layer") -> Step:
    mixer, norm = layer.mixer, _norm(layer.norm)
    assert isinstance(mixer, Mamba)
    r, n, inner = mixer.config.dt_rank, mixer.config.d_state, mixer.config.d_inner
    into, split, dt_of, out_of = map(_product, (mixer.in_proj, mixer.x_proj, mixer.dt_proj, mixer.out_proj))
    weight_IK = mixer.conv1d.weight.squeeze(1)
    # A step looks for no gaps, and a broadcast array, as seeded weights are, holds fewer values than it shows
    A_IN, skip_I, bias_I = (mx.contiguous(a) for a in (mixer.A_log, mixer.D, mixer.dt_proj.bias))
    mx.eval(A_IN, skip_I, bias_I)

    def step(h_BD: mx.array, state: MambaState | None) -> tuple[mx.array, MambaState | None]:
        assert state is not None
        xz_BX = into(h_BD, norm)
        x_BI, conv_BKI = conv_step(xz_BX, weight_IK, mixer.conv1d.bias, state.conv_BKI)
        dt_BR, b_BN, c_BN = columns(split(x_BI, Around()), r, r + n)
        dt_BR, b_BN, c_BN = mixer.normed(dt_BR, b_BN, c_BN)
        dt_BI, z_BI = dt_of(dt_BR, Around()), columns(xz_BX, inner)[1]
        scanned = selective_scan(
            x_BI[:, None], dt_BI[:, None], A_IN, b_BN[:, None], c_BN[:, None], skip_I, z_BI[:, None],
            bias_I, None, state.scan_BIN, return_state=True, log_A=True, no_gradient=True,
        )  # fmt: skip
        y, scan_BIN = scanned
        return out_of(y.squeeze(1), Around(residual_MO=h_BD)), MambaState(conv_BKI, scan_BIN)

    return step


def _moe(layer: "Layer") -> Step:
    mixer, norm = layer.mixer, _norm(layer.norm)
    assert isinstance(mixer, MoE)
    w1, w2 = (_expert_layer(w) for w in (mixer.experts.w1, mixer.experts.w2))
    router_ED, k = mixer.router.weight, mixer.config.top_k

    def step(h_BD: mx.array, _: MambaState | None) -> tuple[mx.array, MambaState | None]:
        routing = route(matvec(h_BD, router_ED, None, norm, mx.float32), k, no_gradient=True)
        return feed_forward_few(h_BD, norm, routing.gate_Mk, routing.expert_Mk, w1, w2), None

    def whole(h_BD: mx.array, _: MambaState | None) -> tuple[mx.array, MambaState | None]:
        return h_BD + mixer(layer.norm(h_BD[:, None]))[0].squeeze(1), None

    ours = not mixer.config.hidden.gated and mixer.config.gate is Gate.SOFTMAX
    return step if ours and w1.takes_each and w2.takes_each else whole


def _merges(projection: Adapted) -> bool:
    return not isinstance(projection.base, mx.array) and math.prod(projection.base.shape) <= _SMALL


def _from_codes(projection: Adapted) -> bool:
    return not isinstance(projection.base, mx.array) and not _merges(projection)


def _merged(projection: Adapted) -> mx.array | None:
    """W with its adapter, dense in float32, of a small NF4 matrix or stack."""
    base = projection.base
    if isinstance(base, mx.array) or not _merges(projection):
        return None
    w = base.dequantize(mx.float32)
    if projection.adapted:
        w = merged(w, projection.lora_a, projection.lora_b, projection.lora_scale, projection.magnitude)
    mx.eval(w)
    return w


def _product(projection: Projection) -> Callable[[mx.array, Around], mx.array]:
    """x_BI -> y_BO with what is around it."""
    dense = _merged(projection)
    if dense is not None:
        return lambda x_BI, around: matvec(x_BI, dense, None, around)
    gain_O = projection.gains()
    if gain_O is None:
        return lambda x_BI, around: _adapted(projection, x_BI, around)

    def scaled(x_BI: mx.array, around: Around) -> mx.array:
        y_BO = _adapted(projection, x_BI, replace(around, relu=False, residual_MO=None), mx.float32)
        return around.end(y_BO * gain_O, x_BI.dtype)

    return scaled


def _adapted(
    projection: Projection | Embedding, x_BI: mx.array, around: Around, out: mx.Dtype | None = None
) -> mx.array:
    """The same straight from what the projection holds."""
    base = projection.base
    if projection.adapted:
        low = matvec(x_BI, projection.lora_a, None, replace(around, residual_MO=None), mx.float32)
        around = replace(around, low_Mr=low, b=projection.lora_b, scale=projection.lora_scale)
    if isinstance(base, mx.array):
        return matvec(x_BI, base, None, around, out)
    assert isinstance(base, NF4Tensor)
    if base.shape[1] % BLOCK == 0:
        return nf4_matvec(x_BI, base.parts, base.shape[0], None, around, out)
    # Rows that are no whole blocks, of a matrix too large to be kept dense
    y_BO = around.before(x_BI) @ base.dequantize(mx.float32, after=x_BI).T
    return around.after(y_BO, None, out or x_BI.dtype)


def _expert_layer(projection: Adapted) -> ExpertLayer:
    dense = _merged(projection)
    if dense is not None:
        return ExpertLayer(dense)
    base = projection.base
    assert not isinstance(base, NF4Tensor)
    if not projection.adapted:
        return ExpertLayer(base)
    return ExpertLayer(base, projection.lora_a, projection.lora_b, projection.lora_scale, gain=projection.gains())


def flat(state: State) -> list[mx.array]:
    """The arrays of a state in order."""
    return [array for layer in state if layer is not None for array in layer]


def folded(arrays: Sequence[mx.array], like: Sequence[object]) -> State:
    """The state of `flat` arrays; None for the layers that are None in `like`."""
    left = iter(arrays)
    return [None if layer is None else MambaState(next(left), next(left)) for layer in like]
