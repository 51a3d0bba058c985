"""The Mamba-MoE language model: embed -> for each layer h = h + mixer(rmsnorm(h)) -> rmsnorm -> tied head.

Shapes: B batch, T time, D d_model, V vocabulary, M = B*T.
"""

from collections.abc import Callable

from magellano import init
from magellano.backend import mx, nn
from magellano.decode import Decoder
from magellano.layout import EMBEDDING, HEAD, ParamSpec, layer_parameters, parameters
from magellano.linear import Embedding, Projection, Weight, array
from magellano.mamba import Mamba, MambaState
from magellano.moe import MoE, RouterState
from magellano.names import FinalNorm, LayerKind
from magellano.ops import token_scores
from magellano.ops.cross_entropy import Renyi, objective_and_nll
from magellano.ops.moe import Room
from magellano.profile import ModelConfig

Source = Callable[[ParamSpec], Weight]  # where weights come from: a seed, or files


def seeded(seed: int = 0) -> Source:
    """Initial weights, float32 and lazy."""
    return lambda spec: init.initial(spec, seed)


class RMSNorm(nn.Module):
    """x / rms(x) * weight, in float32 inside (Zhang & Sennrich 2019, arXiv 1910.07467)."""

    def __init__(self, weight: mx.array, eps: float):
        super().__init__()
        self.weight, self.eps = weight, eps

    def __call__(self, x: mx.array) -> mx.array:
        return mx.fast.rms_norm(x, self.weight.astype(x.dtype), self.eps)


class LayerNorm(nn.Module):
    """(x - mean) / deviation * weight + bias, in float32 inside (Ba et al. 2016, arXiv 1607.06450)."""

    def __init__(self, weight: mx.array, bias: mx.array, eps: float):
        super().__init__()
        self.weight, self.bias, self.eps = weight, bias, eps

    def __call__(self, x: mx.array) -> mx.array:
        return mx.fast.layer_norm(x, self.weight.astype(x.dtype), self.bias.astype(x.dtype), self.eps)


class Layer(nn.Module):
    """h + mixer(rmsnorm(h)), the mixer being Mamba or MoE by the layer's number."""

    def __init__(self, config: ModelConfig, index: int, source: Source):
        super().__init__()
        specs = {spec.name: spec for spec in layer_parameters(config, index)}
        at = f"backbone.layers.{index}."
        self.kind = config.kind(index)
        self.norm = RMSNorm(array(source(specs[at + "norm.weight"])), config.norm_eps)
        mixers: dict[LayerKind, type[Mamba] | type[MoE]] = {LayerKind.MAMBA: Mamba, LayerKind.MOE: MoE}
        self.mixer = mixers[self.kind](config, lambda name: source(specs[f"{at}mixer.{name}"]))

    def __call__(
        self, h_BTD: mx.array, reset_BT: mx.array, *, room: Room | None = None, unread: bool = False
    ) -> tuple[mx.array, RouterState | None]:
        """Returns h_BTD and what the router did (None for Mamba). `room`: for the experts' rows (see MoE). `unread`: h
        is only differentiated and may be wrong.
        """
        u_BTD, mixer = self.norm(h_BTD), self.mixer
        if isinstance(mixer, Mamba):
            return h_BTD + mixer(u_BTD, reset_BT, unread=unread)[0], None
        y_BTD, routed = mixer(u_BTD, room=room, unread=unread)
        return h_BTD + y_BTD, routed

    def step(self, h_BTD: mx.array, state: MambaState | None) -> tuple[mx.array, MambaState | None]:
        """The same with a state carried from call to call; MoE layers have none."""
        u_BTD, mixer = self.norm(h_BTD), self.mixer
        if isinstance(mixer, MoE):
            return h_BTD + mixer(u_BTD)[0], None
        y_BTD, state = mixer(u_BTD, state=state)
        return h_BTD + y_BTD, state


class Backbone(nn.Module):
    """Embedding, layers and final norm, under transformers' names."""

    def __init__(self, config: ModelConfig, source: Source):
        super().__init__()
        specs = {spec.name: spec for spec in parameters(config)}
        self.embeddings = Embedding(source(specs[EMBEDDING]))
        self.layers = [Layer(config, index, source) for index in range(config.n_layers)]
        weight = array(source(specs["backbone.norm_f.weight"]))
        if config.final_norm is FinalNorm.LAYER:
            bias = array(source(specs["backbone.norm_f.bias"]))
            self.norm_f: RMSNorm | LayerNorm = LayerNorm(weight, bias, config.norm_eps)
        else:
            self.norm_f = RMSNorm(weight, config.norm_eps)


class MagellanoLM(nn.Module):
    """`model(tokens[B,T]) -> logits[B,T,V]`. Weights come from `source`, by default the initial ones of seed 0."""

    def __init__(self, config: ModelConfig, source: Source | None = None, compute: mx.Dtype = mx.float32):
        super().__init__()
        self.config = config
        self.compute = compute
        self.chunk = 512  # rows of logits that exist at once
        source = source or seeded()
        self.backbone = Backbone(config, source)
        if not config.tied:
            self.lm_head = Embedding(source(next(spec for spec in parameters(config) if spec.name == HEAD)))

    @property
    def head(self) -> Embedding:
        """What makes logits: the embedding, or a matrix of its own."""
        return self.backbone.embeddings if self.config.tied else self.lm_head

    def keep_small_dense(self) -> None:
        """See Projection.keep_dense; for training."""
        for _, module in self.named_modules():
            if isinstance(module, Projection):
                module.keep_dense(self.compute)

    def __call__(self, tokens_BT: mx.array, reset_BT: mx.array | None = None) -> mx.array:
        """Logits [B, T, V]. reset is 1 where a document starts."""
        return self.head.logits(self.hidden(tokens_BT, reset_BT))

    def hidden(self, tokens_BT: mx.array, reset_BT: mx.array | None = None) -> mx.array:
        """The final hidden states [B, T, D]."""
        if tokens_BT.ndim != 2:
            raise ValueError(f"tokens must be [B, T], got shape {tokens_BT.shape}")
        if reset_BT is None:
            reset_BT = mx.zeros(tokens_BT.shape, dtype=mx.uint8)
        h_BTD = self.backbone.embeddings(tokens_BT).astype(self.compute)
        for layer in self.backbone.layers:
            h_BTD, _ = layer(h_BTD, reset_BT)
        return self.backbone.norm_f(h_BTD)

    def objective(
        self,
        h_BTD: mx.array,
        targets_BT: mx.array,
        weights_BT: mx.array,
        renyi: Renyi | None = None,
        counted: mx.array | None = None,
    ) -> tuple[mx.array, mx.array]:
        """From the final hidden states the sum to minimise, that of weight * -log p(target), with `renyi` less its
        entropy term; and the sum of weight * -log p(target), without gradient; in nats. `counted`: the rows 0 .. B*T-1
        whose weight is not 0, if the head is to see them alone.
        """
        h_MD, target_M, weight_M = h_BTD.reshape(-1, h_BTD.shape[-1]), targets_BT.reshape(-1), weights_BT.reshape(-1)
        if counted is not None:
            h_MD, target_M, weight_M = h_MD[counted], target_M[counted], weight_M[counted]
        x_MD, w, u_Mr, b_Vr = self.head.head(h_MD)
        return objective_and_nll(
            x_MD, w, target_M, weight_M, u_Mr, b_Vr, self.chunk, frozen=u_Mr is not None, renyi=renyi
        )

    def scores(
        self, tokens_BT: mx.array, targets_BT: mx.array, reset_BT: mx.array, chunk: int = 512
    ) -> tuple[mx.array, mx.array]:
        """-log p(target) [B, T] in nats and whether the target was the likeliest token [B, T]; no gradient."""
        h_BTD = self.hidden(tokens_BT, reset_BT)
        nll_M, correct_M = self.hidden_scores(h_BTD.reshape(-1, h_BTD.shape[-1]), targets_BT.reshape(-1), chunk)
        return nll_M.reshape(tokens_BT.shape), correct_M.reshape(tokens_BT.shape)

    def hidden_scores(self, h_MD: mx.array, target_M: mx.array, chunk: int = 512) -> tuple[mx.array, mx.array]:
        """The same from final hidden states, [M] each."""
        x_MD, w, u_Mr, b_Vr = self.head.head(h_MD)
        return token_scores(x_MD, w, target_M, mx.ones((x_MD.shape[0],)), u_Mr, b_Vr, chunk)

    def expert_counts(self, tokens_BT: mx.array, reset_BT: mx.array) -> list[list[int]]:
        """Token copies per expert for each MoE layer, in order."""
        h_BTD = self.backbone.embeddings(tokens_BT).astype(self.compute)
        counts = []
        for layer in self.backbone.layers:
            if layer.kind is LayerKind.MOE:
                counts.append(layer.mixer.counts(layer.norm(h_BTD)))
            h_BTD, _ = layer(h_BTD, reset_BT)
        return counts

    def initial_state(self, batch: int) -> list[MambaState | None]:
        """The state before the first token: one entry a layer, constant in size whatever the position."""
        layers = self.backbone.layers
        return [x.mixer.initial_state(batch, self.compute) if x.kind is LayerKind.MAMBA else None for x in layers]

    def step(self, tokens_BT: mx.array, state: list[MambaState | None]) -> tuple[mx.array, list[MambaState | None]]:
        """Continue from `state` by T >= 1 tokens: logits [B, T, V] and the new state. Same result as the full
        forward.
        """
        h_BTD, new = self.advance(tokens_BT, state)
        return self.logits(h_BTD), new

    def advance(self, tokens_BT: mx.array, state: list[MambaState | None]) -> tuple[mx.array, list[MambaState | None]]:
        """The same up to the final hidden states [B, T, D]: of a prompt's only the last is wanted."""
        h_BTD = self.backbone.embeddings(tokens_BT).astype(self.compute)
        new = []
        for layer, old in zip(self.backbone.layers, state, strict=True):
            h_BTD, layer_state = layer.step(h_BTD, old)
            if layer_state is not None:  # a view of all inputs would keep them
                layer_state = layer_state._replace(conv_BKI=mx.contiguous(layer_state.conv_BKI))
            new.append(layer_state)
        return self.backbone.norm_f(h_BTD), new

    def logits(self, h: mx.array) -> mx.array:
        """Logits [.., V] of final hidden states [.., D]."""
        return self.head.logits(h)

    def decoder(self) -> Decoder:
        """Steps of one token a sequence with few launches, for weights that do not change meanwhile."""
        return Decoder(self)
