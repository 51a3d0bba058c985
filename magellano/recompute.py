"""Gradient checkpointing (Chen et al. 2016, arXiv 1604.06174): a layer's intermediates are made again in the backward
pass.

`mx.checkpoint` alone saves nothing where operations must compute at once, as on a CPU: inside mx.grad MLX keeps what
every computed array was made of. So each layer runs on arrays that are cut loose (`detached`), forward and backward.
"""

from typing import Any

from magellano.backend import mx, nn, tree_flatten, tree_unflatten
from magellano.ops.lazy import detached


def recomputed(layer: nn.Module, h: mx.array, *constants: mx.array) -> tuple[mx.array, ...]:
    """layer(h, *constants), a tuple of arrays, holding only h and the outputs for the backward pass.

    Differentiable in h and the layer's trainable parameters, not in `constants`.
    """
    trainable: dict[str, mx.array] = dict(tree_flatten(layer.trainable_parameters()))
    names, values = list(trainable), list(trainable.values())

    def call(h: mx.array, *parameters: mx.array) -> tuple[mx.array, ...]:
        layer.update(tree_unflatten(list(zip(names, parameters, strict=True))))
        try:
            return tuple(layer(h, *constants))
        finally:
            layer.update(tree_unflatten(list(trainable.items())))

    @mx.custom_function
    def run(*arrays: mx.array) -> tuple[mx.array, ...]:
        return tuple(detached(y) for y in call(*map(detached, arrays)))

    @run.vjp
    def run_vjp(primals: Any, cotangents: Any, _: Any) -> Any:
        primals = primals if isinstance(primals, list | tuple) else [primals]
        _, gradients = mx.vjp(call, [detached(a) for a in primals], [detached(a) for a in cotangents])
        found = [detached(g) for g in gradients]
        return found if len(found) > 1 else found[0]

    outputs: tuple[mx.array, ...] = tuple(run(h, *values))  # type: ignore[arg-type]
    return outputs
