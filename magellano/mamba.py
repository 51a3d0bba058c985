"""The Mamba-1 mixer (Gu & Dao 2023, arXiv 2312.00752), weights laid out as `transformers.MambaForCausalLM` has them.

Shapes: B batch, T time, D d_model, I d_inner, N d_state, R dt_rank, K d_conv.
"""

from collections.abc import Callable
from typing import NamedTuple

from magellano.backend import mx, nn
from magellano.linear import Projection, Weight, array
from magellano.ops import causal_conv, selective_scan
from magellano.profile import ModelConfig


class MambaState(NamedTuple):
    """What a layer remembers when tokens stream: the convolution's last K-1 inputs and the scan's state."""

    conv_BKI: mx.array  # [B, K-1, I]
    scan_BIN: mx.array  # float32


def _with_state(result: mx.array | tuple[mx.array, mx.array]) -> tuple[mx.array, mx.array | None]:
    """What an operation returns with and without return_state, in one form."""
    return result if isinstance(result, tuple) else (result, None)


class Conv1d(nn.Module):
    """Holds the depthwise kernel under transformers' names: weight [I, 1, K], bias [I]."""

    def __init__(self, weight: mx.array, bias: mx.array):
        super().__init__()
        self.weight, self.bias = weight, bias


class DtProjection(Projection):
    """R -> I. Its bias goes into the scan, where softplus(dt + bias) is fused."""

    def __init__(self, weight: Weight, bias: mx.array):
        super().__init__(weight)
        self.bias = bias


class Mamba(nn.Module):
    """u_BTD -> y_BTD. `get(name)` supplies the weight called `name` within this mixer."""

    def __init__(self, config: ModelConfig, get: Callable[[str], Weight]):
        super().__init__()
        self.config = config
        self.in_proj = Projection(get("in_proj.weight"))
        self.conv1d = Conv1d(array(get("conv1d.weight")), array(get("conv1d.bias")))
        self.x_proj = Projection(get("x_proj.weight"))
        self.dt_proj = DtProjection(get("dt_proj.weight"), array(get("dt_proj.bias")))
        self.A_log = array(get("A_log"))
        self.D = array(get("D"))
        self.out_proj = Projection(get("out_proj.weight"))

    def __call__(
        self,
        u_BTD: mx.array,
        reset_BT: mx.array | None = None,
        state: MambaState | None = None,
        *,
        unread: bool = False,
    ) -> tuple[mx.array, MambaState | None]:
        """Returns y_BTD, and the state after the last step where one was given. `unread`: y is only differentiated and
        may be left out.
        """
        c, free = self.config, self.trainable_parameters()
        keep = state is not None
        conv_BKI, scan_BIN = state if state is not None else (None, None)
        # 1. two streams of width I
        x_BTI, z_BTI = mx.split(self.in_proj(u_BTD), 2, axis=-1)
        # 2. a short causal convolution per channel, then silu
        x_BTI, conv_BKI = _with_state(
            causal_conv(
                x_BTI, self.conv1d.weight.reshape(c.d_inner, c.d_conv), self.conv1d.bias, reset_BT, conv_BKI,
                return_state=keep, frozen_parameters=not free["conv1d"],
            )
        )  # fmt: skip
        # 3. the step size and the input and output maps of the state depend on the token
        dt_BTR, b_BTN, c_BTN = mx.split(self.x_proj(x_BTI), [c.dt_rank, c.dt_rank + c.d_state], axis=-1)
        dt_BTR, b_BTN, c_BTN = self.normed(dt_BTR, b_BTN, c_BTN)
        dt_BTI = self.dt_proj(dt_BTR)
        # 4. the selective scan, gated by silu(z)
        frozen = not ({"A_log", "D"} & free.keys() or "bias" in free["dt_proj"])
        y_BTI, scan_BIN = _with_state(
            selective_scan(
                x_BTI, dt_BTI, self.A_log, b_BTN, c_BTN, self.D, z_BTI, self.dt_proj.bias, reset_BT, scan_BIN,
                return_state=keep, frozen_parameters=frozen, log_A=True,
            )
        )  # fmt: skip
        # 5. back to the residual width
        y_BTD = self.out_proj(y_BTI, unread=unread)
        return y_BTD, None if conv_BKI is None or scan_BIN is None else MambaState(conv_BKI, scan_BIN)

    def normed(self, *parts: mx.array) -> tuple[mx.array, ...]:
        """x / rms(x), where the model has dt, B and C so."""
        eps = self.config.dt_norm_eps
        return tuple(mx.fast.rms_norm(x, None, eps) for x in parts) if eps else parts

    def initial_state(self, batch: int, dtype: mx.Dtype) -> MambaState:
        c = self.config
        return MambaState(
            mx.zeros((batch, c.d_conv - 1, c.d_inner), dtype=dtype), mx.zeros((batch, c.d_inner, c.d_state))
        )
