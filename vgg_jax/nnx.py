"""VGG as a Flax NNX module.

    net = to_nnx(model, variables, rngs=nnx.Rngs(0))
    logits = net(images)

`VGG` holds the variables. The linen module of `vgg_jax.model` computes.
"""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
from flax import nnx
from jax import Array

from vgg_jax import model as linen
from vgg_jax.errors import InputError

_VARIABLE_TYPES: dict[str, type[nnx.Variable]] = {
    "params": nnx.Param,
    "batch_stats": nnx.BatchStat,
}


class VGG(nnx.Module):
    """A `vgg_jax.VGG` as an NNX module, which holds its variables.

    Each learned layer is an attribute, named as in the released models: `net.conv1_1.kernel`,
    `net.fc8.bias`, `net.bn1_1.scale`. The parameters are `nnx.Param`. The running statistics
    `net.bn1_1.mean` and `net.bn1_1.var` are `nnx.BatchStat`.

    `net.train()` turns dropout on. It also makes batch normalisation use the batch's statistics
    and update the running ones. `net.eval()` turns both off. A new net is in training mode, like
    the layers of `flax.nnx`: its random parameters are there to be trained. A net from `to_nnx` is
    in inference mode.

    Args:
        model: The linen module, such as `vgg_jax.vgg16(num_classes=10)`.
        variables: Its variables, as for `to_nnx`. None draws new ones from `rngs`, as `model.init`
            does.
        rngs: Random keys: "params" for new parameters, and "dropout".

    Attributes:
        model: The linen module, whose fields are the settings of the net. A changed
            `model.clone(frozen=...)` can be assigned.
        deterministic: No dropout.
        use_running_average: Batch normalisation uses the running statistics. With batch
            normalisation it must equal `deterministic`.
        rngs: Random keys of dropout, or None.

    Raises:
        InputError: If the variables are not those of the model, or `rngs` is missing.
    """

    def __init__(
        self,
        model: linen.VGG,
        variables: Mapping[str, Any] | None = None,
        *,
        rngs: nnx.Rngs | None = None,
    ) -> None:
        linen.check_net(model, {} if variables is None else variables)
        if rngs is not None and not isinstance(rngs, nnx.Rngs):
            raise InputError(f"rngs is a {type(rngs).__name__}: expected nnx.Rngs(seed)")
        if variables is None:
            if rngs is None:
                raise InputError("rngs is None: expected nnx.Rngs(seed), to draw the parameters")
            variables = model.lazy_init(rngs.params(), model.one_image())
        else:
            _check_variables(model, variables)
        self.model = model
        self.deterministic = False
        self.use_running_average = False
        self.rngs = nnx.data(None if rngs is None else rngs["dropout"].fork())
        layers: dict[str, dict[str, nnx.Variable]] = {}
        for collection, variable_type in _VARIABLE_TYPES.items():
            for name, layer in variables.get(collection, {}).items():
                leaves = {leaf: variable_type(jnp.asarray(x)) for leaf, x in layer.items()}
                layers.setdefault(name, {}).update(leaves)
        for name, leaves in layers.items():
            setattr(self, name, nnx.Dict(leaves))

    if TYPE_CHECKING:  # the layers

        def __getattr__(self, name: str) -> Any: ...

    def set_view(
        self, deterministic: bool | None = None, use_running_average: bool | None = None
    ) -> None:
        """Sets the mode of a view (`nnx.view`).

        Args:
            deterministic: No dropout. None leaves it as it is.
            use_running_average: Batch normalisation uses the running statistics. None leaves it as
                it is.
        """
        if deterministic is not None:
            self.deterministic = deterministic
        if use_running_average is not None:
            self.use_running_average = use_running_average

    def __call__(self, images: Array, mask: Array | None = None) -> Array:
        """Computes logits of images of the net's own size.

        In training mode it updates the running statistics and takes a key from `rngs`.

        Args:
            images: (N, image_size, image_size, C), with the C channels of `model.in_channels`.
            mask: bool (N,), True for the examples that count in the batch's statistics.

        Returns:
            Logits (N, K).

        Raises:
            InputError: If the images have another size or shape, the net has no fully connected
                layers, or dropout has no `rngs`.
        """
        self._check_layers(("fc8",))
        if not self._is_training():
            return self._apply(images, mask=mask)
        rngs = self._dropout_rngs()
        logits, updates = self._apply(
            images, train=True, mask=mask, rngs=rngs, mutable=["batch_stats"]
        )
        for name, layer in updates.get("batch_stats", {}).items():
            for leaf, value in layer.items():
                getattr(self, name)[leaf][...] = value
        return logits

    def score_map(self, images: Array, ceil: bool = False) -> Array:
        """Computes the dense class-score map (§3.2), as in inference mode.

        Args:
            images: (N, H, W, C), at least image_size on each side.
            ceil: Round up the sizes of poolings, as Caffe does.

        Returns:
            Scores (N, h, w, K), as `vgg_jax.VGG.score_map` does.

        Raises:
            InputError: As `vgg_jax.VGG.score_map`, or if the net has no fully connected layers.
        """
        self._check_layers(("fc8",))
        return self._apply(images, ceil=ceil, method="score_map")

    def features(self, images: Array, layers: Iterable[str]) -> dict[str, Array]:
        """Computes activations by name, as in inference mode.

        Args:
            images: (N, H, W, C), large enough for the deepest layer.
            layers: Names of layers, as of `vgg_jax.VGG.features`.

        Returns:
            The activations (N, h, w, C) by name.

        Raises:
            InputError: As `vgg_jax.VGG.features`, or if the net has no fully connected layers and
                one is needed.
        """
        if not isinstance(layers, str):  # the linen module refuses a string
            layers = tuple(layers)
            self._check_layers(layers)
        return self._apply(images, layers=layers, method="features")

    def to_linen(self) -> tuple[linen.VGG, dict[str, Any]]:
        """Gives the linen module and its variables, for `vgg_jax.save` or `model.apply`.

        Returns:
            The model and its variables, as `vgg_jax.load` returns them.
        """
        return self.model, self._variables()

    def _apply(self, images: Array, **settings: Any) -> Any:
        return self.model.apply(self._variables(), images, **settings)

    def _variables(self) -> dict[str, Any]:
        """The variables of the linen module."""
        variables: dict[str, Any] = {}
        for layer in self.model.layers():
            for leaf, variable in getattr(self, layer.name, {}).items():
                collection = "batch_stats" if isinstance(variable, nnx.BatchStat) else "params"
                layers = variables.setdefault(collection, {})
                layers.setdefault(layer.name, {})[leaf] = variable.get_value()
        return variables

    def _check_layers(self, targets: tuple[str, ...]) -> None:
        """Raises InputError if the targets need a fully connected layer that is missing."""
        layers = linen.select_layers(self.model.layers(), targets)
        missing = [
            layer.name for layer in layers if layer.type == "fc" and not hasattr(self, layer.name)
        ]
        if missing:
            raise InputError(
                f"{layers[-1].name} needs {', '.join(missing)}, and the net has no fully connected "
                "layers: expected weights with them, or features up to "
                f"pool{len(self.model.config.stages)}"
            )

    def _is_training(self) -> bool:
        if self.model.batch_norm and self.deterministic != self.use_running_average:
            raise InputError(
                f"deterministic is {self.deterministic} and use_running_average is "
                f"{self.use_running_average}: expected the same value, as net.train() and "
                "net.eval() set them; name batch normalisations that keep their statistics in "
                "the model's `frozen`"
            )
        return not self.deterministic

    def _dropout_rngs(self) -> dict[str, Array]:
        if not self.model.dropout_rate:
            return {}
        if self.rngs is None:
            raise InputError(
                "rngs is None and the net is in training mode: expected "
                "to_nnx(model, variables, rngs=nnx.Rngs(seed)), or net.eval() before inference"
            )
        return {"dropout": self.rngs()}


def to_nnx(model: linen.VGG, variables: Mapping[str, Any], *, rngs: nnx.Rngs | None = None) -> VGG:
    """Makes an NNX module from a linen module and its variables, in inference mode.

    The way back is `VGG.to_linen`.

    Args:
        model: The linen module.
        variables: Its variables, as `vgg_jax.load` or `model.init` returns them. If they have no
            fully connected layers, the NNX module has none either: it gives features only.
        rngs: Random keys of dropout. Inference needs none.

    Returns:
        The NNX module.

    Raises:
        InputError: If the variables are not those of the model.
    """
    net = VGG(model, variables, rngs=rngs)
    net.eval()
    return net


def _check_variables(model: linen.VGG, variables: Mapping[str, Any]) -> None:
    """Raises InputError unless the layers are the model's, with or without fc layers."""
    layers = model.layers()
    if not any(name.startswith("fc") for name in variables.get("params", {})):
        layers = tuple(layer for layer in layers if layer.type != "fc")
    for collection, expected in linen.variable_shapes(layers, model.in_channels).items():
        linen.check_layers(collection, variables.get(collection, {}), expected, expected)
