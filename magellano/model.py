"""The Mamba-MoE language model: embed -> for each layer h = h + mixer(rmsnorm(h)) -> rmsnorm -> tied head.

Shapes: B batch, T time, D d_model, V vocabulary, M = B*T.
"""

from collections.abc import Callable

from magellano import init
from magellano.backend import mx, nn
from magellano.layout import EMBEDDING, ParamSpec, layer_parameters, parameters
from magellano.linear import Embedding, Weight, array
from magellano.mamba import Mamba, MambaState
from magellano.moe import MoE
from magellano.names import LayerKind
from magellano.ops import linear_cross_entropy, token_scores
from magellano.profile import ModelConfig
from magellano.recompute import recomputed

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

    def __call__(self, h_BTD: mx.array, reset_BT: mx.array) -> tuple[mx.array, mx.array]:
        """Returns h_BTD and the router's losses [2] (zeros for Mamba)."""
        u_BTD, mixer = self.norm(h_BTD), self.mixer
        if isinstance(mixer, Mamba):
            return h_BTD + mixer(u_BTD, reset_BT)[0], mx.zeros((2,))
        y_BTD, losses = mixer(u_BTD)
        return h_BTD + y_BTD, losses

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
        self.norm_f = RMSNorm(array(source(specs["backbone.norm_f.weight"])), config.norm_eps)


class MagellanoLM(nn.Module):
    """`model(tokens[B,T]) -> logits[B,T,V]`. Weights come from `source`, by default the initial ones of seed 0."""

    def __init__(self, config: ModelConfig, source: Source | None = None, compute: mx.Dtype = mx.float32):
        super().__init__()
        self.config = config
        self.compute = compute
        self.checkpointing = False  # recompute each layer in the backward pass
        self.backbone = Backbone(config, source or seeded())

    def __call__(self, tokens_BT: mx.array, reset_BT: mx.array | None = None) -> mx.array:
        """Logits [B, T, V]. reset is 1 where a document starts."""
        return self.backbone.embeddings.logits(self.hidden(tokens_BT, reset_BT)[0])

    def hidden(self, tokens_BT: mx.array, reset_BT: mx.array | None = None) -> tuple[mx.array, mx.array]:
        """The final hidden states [B, T, D] and the sum of the routers' losses [2]."""
        if tokens_BT.ndim != 2:
            raise ValueError(f"tokens must be [B, T], got shape {tokens_BT.shape}")
        if reset_BT is None:
            reset_BT = mx.zeros(tokens_BT.shape, dtype=mx.uint8)
        h_BTD = self.backbone.embeddings(tokens_BT).astype(self.compute)
        losses = mx.zeros((2,))
        for layer in self.backbone.layers:
            h_BTD, more = recomputed(layer, h_BTD, reset_BT) if self.checkpointing else layer(h_BTD, reset_BT)
            losses = losses + more
        return self.backbone.norm_f(h_BTD), losses

    def loss_sum(
        self,
        tokens_BT: mx.array,
        targets_BT: mx.array,
        weights_BT: mx.array,
        reset_BT: mx.array,
        chunk: int,
        counted: mx.array | None = None,
    ) -> tuple[mx.array, mx.array]:
        """Sum of weight * -log p(target) in nats, and the routers' losses [2]; `chunk` rows of logits at once.
        `counted`: the rows 0 .. B*T-1 whose weight is not 0, if the head is to see them alone.
        """
        h_BTD, losses = self.hidden(tokens_BT, reset_BT)
        h_MD, target_M, weight_M = h_BTD.reshape(-1, h_BTD.shape[-1]), targets_BT.reshape(-1), weights_BT.reshape(-1)
        if counted is not None:
            h_MD, target_M, weight_M = h_MD[counted], target_M[counted], weight_M[counted]
        x_MD, w, u_Mr, b_Vr = self.backbone.embeddings.head(h_MD)
        return linear_cross_entropy(x_MD, w, target_M, weight_M, u_Mr, b_Vr, chunk, frozen=u_Mr is not None), losses

    def scores(
        self, tokens_BT: mx.array, targets_BT: mx.array, reset_BT: mx.array, chunk: int = 512
    ) -> tuple[mx.array, mx.array]:
        """-log p(target) [B, T] in nats and whether the target was the likeliest token [B, T]; no gradient."""
        h_BTD, _ = self.hidden(tokens_BT, reset_BT)
        x_MD, w, u_Mr, b_Vr = self.backbone.embeddings.head(h_BTD.reshape(-1, h_BTD.shape[-1]))
        ones = mx.ones((x_MD.shape[0],))
        nll_M, correct_M = token_scores(x_MD, w, targets_BT.reshape(-1), ones, u_Mr, b_Vr, chunk)
        return nll_M.reshape(tokens_BT.shape), correct_M.reshape(tokens_BT.shape)

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
        h_BTD = self.backbone.embeddings(tokens_BT).astype(self.compute)
        new = []
        for layer, old in zip(self.backbone.layers, state, strict=True):
            h_BTD, layer_state = layer.step(h_BTD, old)
            new.append(layer_state)
        return self.backbone.embeddings.logits(self.backbone.norm_f(h_BTD)), new
