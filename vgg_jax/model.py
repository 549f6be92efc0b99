"""VGG as a Flax linen module: Table 1 of the paper and its initialisation (§3.1)."""

import inspect
import logging
import numbers
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Concatenate, NamedTuple, ParamSpec

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict
from jax import Array

from vgg_jax.configs.models import CONFIGS, Layer, VGGConfig, layer_table
from vgg_jax.configs.train import TrainConfig
from vgg_jax.errors import InputError
from vgg_jax.layers import BatchNorm, Conv, Dropout, FullyConnected, local_response_norm
from vgg_jax.ops.epilogue import EPILOGUE_KINDS, Epilogue, EpilogueKind
from vgg_jax.ops.pooling import avg_pool, max_pool, pool_mask, relu

logger = logging.getLogger(__name__)

P = ParamSpec("P")
Initializers = tuple[nn.initializers.Initializer, nn.initializers.Initializer]

# Maps a standard deviation to two kernel initialisers: convolutions, fully connected layers. Biases
# start at 0.
INITIALIZERS: dict[str, Callable[[float], Initializers]] = {
    # §3.1: a normal of "variance 10⁻²". We read 10⁻² as the deviation, as in Krizhevsky's paper:
    # with a deviation of 0.1 the signal explodes (docs/performance.md#initialisation).
    "paper": lambda std: (nn.initializers.normal(std), nn.initializers.normal(std)),
    # The paper's note after submission: with this no net needs pre-training.
    "glorot": lambda std: (nn.initializers.glorot_uniform(), nn.initializers.glorot_uniform()),
    # torchvision's, for inputs of unit variance. It diverges on 0-255 pixels without batch
    # normalisation (docs/performance.md#initialisation).
    "he": lambda std: (
        nn.initializers.variance_scaling(2.0, "fan_out", "normal"),
        nn.initializers.normal(0.01),
    ),
}

POOLS = ("max", "avg")
OTHER_SIZES = ("error", "mean", "adaptive")

# Collection -> layer -> parameter -> shape.
VariableShapes = dict[str, dict[str, dict[str, tuple[int, ...]]]]


class PlannedLayer(NamedTuple):
    """A layer, and how it is computed together with its neighbours."""

    layer: Layer
    epilogue: EpilogueKind = "none"  # of a convolution, which computes it
    is_fused: bool = False  # computed by the convolution before it
    fuse_relu: bool = False  # of a pooling: it also computes the ReLU before it, from its input


class VGG(nn.Module):
    """The networks of Simonyan & Zisserman (arXiv 1409.1556), Table 1.

    Images are float RGB (N, H, W, 3) on the 0-255 scale, minus the mean RGB value. `in_channels`
    sets another number of channels. Parameters are `params/conv1_1/{kernel,bias}` …
    `params/fc8/{kernel,bias}`. Batch normalisation adds `params/bn1_1/{scale,bias}` and
    `batch_stats/bn1_1/{mean,var}`. One parameter set serves `__call__`, `score_map` and `features`.

    Attributes:
        config: Column of Table 1.
        num_classes: Outputs K of fc8.
        batch_norm: Add batch normalisation after each convolution.
        dropout_rate: Dropout after fc6 and fc7 (§3.1).
        dtype: Type of the computation.
        param_dtype: Type of the parameters.
        image_size: Side of the images that `__call__` takes; sets the kernel size of fc6.
        initializer: "glorot", "paper" or "he", a key of `INITIALIZERS`.
        initializer_std: Standard deviation of the initializer "paper".
        frozen: Names of layers that training leaves as they are: their gradients are 0, and
            batch normalisations keep and use their running statistics. An optimizer with weight
            decay must leave them out as well.
        pool: "max", or "avg" for smoother gradients of textures (Gatys et al., arXiv 1508.06576).
        axis_name: Axis of the surrounding `shard_map` over which the batch is split, if any.
            Batch statistics and dropout then cover the global batch.
        in_channels: Channels C of the images. `vgg_jax.with_in_channels` adapts a trained net.
        quick_compile: Convolve by XLA on a CPU, too, for a net that is applied once or twice. A
            program then compiles in a fraction of the time. A batch takes about twice the time,
            gradients and 16 bits far more.
        other_sizes: Logits of images that are not image_size x image_size.

            - "error": an `InputError`.
            - "mean": the mean of the score map, as in the paper's dense evaluation (§3.2). fc6 sees
              windows at the scale of training, so the image is at least image_size on each side.
            - "adaptive": average pooling of the last pooling's output to the size that fc6 reads,
              as torchvision does (`AdaptiveAvgPool2d`). One window sees the whole image, at another
              scale and aspect ratio than in training. The cost of the fully connected layers stays
              the same, and smaller images work too, from 2**len(config.stages) on each side.

            At image_size, all three are equal. `score_map`, `features` and `head` do not depend on
            it.

    Raises:
        InputError: A field has a wrong type or value.
    """

    config: VGGConfig = CONFIGS["D"]
    num_classes: int = 1000
    batch_norm: bool = False
    dropout_rate: float = 0.5
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    image_size: int = 224
    initializer: str = "glorot"
    initializer_std: float = 0.01
    frozen: tuple[str, ...] = ()
    pool: str = "max"
    axis_name: str | None = None
    in_channels: int = 3
    quick_compile: bool = False
    other_sizes: str = "error"

    def __post_init__(self) -> None:
        self._check_fields()
        super().__post_init__()

    def __call__(self, images: Array, train: bool = False, mask: Array | None = None) -> Array:
        """Computes logits of images of the net's own size, or of any size (`other_sizes`).

        Args:
            images: (N, image_size, image_size, C), or (N, H, W, C) if `other_sizes` is set.
            train: Turn dropout on (needs a "dropout" rng), and normalise by the batch's statistics
                (needs `mutable=["batch_stats"]`).
            mask: bool (N,), True for the examples that count in the batch's statistics.

        Returns:
            Logits (N, K).

        Raises:
            InputError: If the images have another size or shape, or the variables are not those of
                this net.
        """
        size = self.image_size
        _check_shape(images, self.in_channels)
        if self.other_sizes == "error" and images.shape[1:3] != (size, size):
            raise InputError(
                f"the images are {images.shape[1]}x{images.shape[2]}: expected {size}x{size}; "
                'rescale and crop them, or set other_sizes="mean" (dense evaluation) or '
                'other_sizes="adaptive" (as torchvision), or use method="score_map"'
            )
        start_after = None
        if self.other_sizes == "adaptive":
            start_after = f"pool{len(self.config.stages)}"
            maps = self._forward(images, (start_after,), train, mask)[start_after]
            images = adaptive_avg_pool(maps, size // 2 ** len(self.config.stages))
        scores = self._forward(images, ("fc8",), train, mask, start_after=start_after)["fc8"]
        return scores.mean((1, 2)) if self.other_sizes == "mean" else scores[:, 0, 0]

    def score_map(self, images: Array, ceil: bool = False) -> Array:
        """Computes the dense class-score map (§3.2): the logits of every window.

        The stride is 2**len(config.stages), 32 for Table 1.

        Args:
            images: (N, H, W, C), at least image_size on each side.
            ceil: Round up the sizes of poolings, as Caffe does.

        Returns:
            Scores (N, h, w, K), where `score_map_size` gives h and w.

        Raises:
            InputError: If the images are smaller than image_size, or have another shape, or `ceil`
                is set and `pool` is "avg".
        """
        return self._forward(images, ("fc8",), ceil=ceil)["fc8"]

    @nn.nowrap
    def score_map_size(self, h: int, w: int, ceil: bool = False) -> tuple[int, int]:
        """Computes the size of the score map.

        Args:
            h: Height of the image.
            w: Width of the image.
            ceil: As in `score_map`.

        Returns:
            Height and width of the score map: h // stride - image_size // stride + 1, and likewise
            for w. The stride is 2**len(config.stages). With `ceil`, h / stride is rounded up.
        """
        stride = 2 ** len(self.config.stages)
        h, w = (-(-side // stride) if ceil else side // stride for side in (h, w))
        return h - self.image_size // stride + 1, w - self.image_size // stride + 1

    def trunk(self, images: Array, valid_mask: Array, ceil: bool = False) -> Array:
        """Computes the input of the last pooling for canvases that pack several images.

        Each image gets the activations it would get alone, surrounded by zeros. This needs enough
        room between two images, see `vgg_jax.evaluation.packing`.

        Args:
            images: Canvases (N, H, W, in_channels).
            valid_mask: bool (N, H, W), True where a pixel belongs to an image.
            ceil: Round up the sizes of poolings, as Caffe does.

        Returns:
            Activations (N, h, w, C).
        """
        layer = self._trunk_end()
        return self._forward(images, (layer,), valid_mask=valid_mask[..., None], ceil=ceil)[layer]

    def head(self, activations: Array) -> Array:
        """Computes logits from the activations before the last pooling, as in inference mode.

        Args:
            activations: (N, h, w, C), the output of the layer before the last pooling: "relu5_3" of
                `features` in net D. The last pooling halves h and w to
                image_size // 2**len(config.stages).

        Returns:
            Logits (N, K).

        Raises:
            InputError: If the activations have another size.
        """
        size = self.image_size // 2 ** len(self.config.stages)
        h, w = activations.shape[1:3]
        if (h // 2, w // 2) != (size, size):
            raise InputError(f"the activations are {h}x{w}: expected {2 * size}x{2 * size}")
        return self.logits_after(activations, self._trunk_end())

    def logits_after(
        self, activations: Array, layer: str, train: bool = False, mask: Array | None = None
    ) -> Array:
        """Computes logits from the output of a layer, for images of the net's own size.

        Args:
            activations: (N, h, w, C), the output of the layer, as `features` returns it.
            layer: Name of the layer.
            train: As for `__call__`.
            mask: As for `__call__`.

        Returns:
            Logits (N, K).
        """
        outputs = self._forward(activations, ("fc8",), train, mask, start_after=layer)
        return outputs["fc8"][:, 0, 0]

    def score_map_after(self, activations: Array, layer: str) -> Array:
        """Computes the score map from the output of a layer, for images of any size.

        Args:
            activations: (N, h, w, C), the output of the layer, as `features` returns it.
            layer: Name of the layer.

        Returns:
            Scores (N, h, w, K), as `score_map` returns them.
        """
        return self._forward(activations, ("fc8",), start_after=layer)["fc8"]

    def features(self, images: Array, layers: Iterable[str]) -> dict[str, Array]:
        """Computes activations by name. Nothing after the deepest layer is computed.

        "conv3_3" and "fc7" are the values before the ReLU, "relu3_3" and "relu7" those after it.

        Args:
            images: (N, H, W, C), large enough for the deepest layer.
            layers: Names of layers.

        Returns:
            The activations (N, h, w, C) by name.

        Raises:
            InputError: If a layer is unknown (the message lists all layers), `layers` is one
                string, or an image is too small (the message gives the smallest size).
        """
        if isinstance(layers, str):
            raise InputError(
                f"layers is the string {layers!r}: expected a tuple; pass ({layers!r},)"
            )
        return self._forward(images, tuple(layers))

    @nn.nowrap
    def one_image(self) -> jax.ShapeDtypeStruct:
        """Describes the smallest batch, for `lazy_init` and `jax.eval_shape`.

        Returns:
            The shape (1, image_size, image_size, in_channels), as float32.
        """
        shape = (1, self.image_size, self.image_size, self.in_channels)
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    @nn.nowrap
    def layers(self) -> tuple[Layer, ...]:
        """Lists the layers in the order of computation.

        Returns:
            Name, type, output features and kernel size of each layer.
        """
        return layer_table(self.config, self.num_classes, self.batch_norm, self.image_size)

    @nn.nowrap
    def _trunk_end(self) -> str:
        """The name of the layer that the last pooling reads."""
        names = [layer.name for layer in self.layers()]
        return names[names.index(f"pool{len(self.config.stages)}") - 1]

    @nn.compact
    def _forward(
        self,
        x: Array,
        targets: tuple[str, ...],
        train: bool = False,
        mask: Array | None = None,
        valid_mask: Array | None = None,
        ceil: bool = False,
        start_after: str | None = None,
    ) -> dict[str, Array]:
        """Runs the layers up to the deepest target, and returns the targets by name.

        `mask` (N,) marks real examples, `valid_mask` (N, H, W, 1) the pixels of images. If
        `start_after` is set, x is the output of that layer instead of images.
        """
        layers = select_layers(self.layers(), targets, start_after)
        self._check_ceil(ceil)
        if start_after is None:
            _check_shape(x, self.in_channels)
        _check_min_size(x, layers)
        self._check_variables(layers, x.shape[3])
        # capture_intermediates and tabulate show the output of each module. No module may then
        # compute the layers after it as well.
        is_recorded = self.is_mutable_collection("intermediates") or self.is_initializing()
        plan = fuse_epilogues(
            layers,
            [layer.name for layer in layers] if is_recorded else targets,
            # A pooling that rounds up also reads padding, which the mask must set to 0 before.
            fuse_pool=self.pool == "max" and not (ceil and valid_mask is not None),
            ceil=ceil,
        )
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        conv_init, fc_init = INITIALIZERS[self.initializer](self.initializer_std)

        x = _apply_mask(x, valid_mask)
        relu_input = x
        outputs = {}
        for layer, epilogue_kind, is_fused, fuse_relu in plan:
            name, layer_type, features, kernel_size = layer
            options = types | {"frozen": name in self.frozen}
            if is_fused and layer_type != "pool":
                pass  # the convolution before it has computed it
            elif layer_type == "conv":
                # With a pooling, the mask comes after it.
                mask_in_epilogue = valid_mask if epilogue_kind == "relu" else None
                epilogue = Epilogue(epilogue_kind, mask_in_epilogue)
                conv = Conv(
                    features,
                    kernel_size,
                    conv_init,
                    quick_compile=self.quick_compile,
                    name=name,
                    **options,
                )
                x = conv(x, epilogue, self.get_variable("packed", name))
            elif layer_type == "bn":
                batch_norm = BatchNorm(axis_name=self.axis_name, name=name, **options)
                x = batch_norm(x, train, mask)
            elif layer_type == "relu":
                relu_input, x = x, _apply_mask(relu(x), valid_mask)
            elif layer_type == "lrn":
                x = local_response_norm(x)
            elif layer_type == "pool":
                pool_input = relu_input if fuse_relu else x
                x = x if is_fused else self._pool(pool_input, ceil, fuse_relu)
                valid_mask = None if valid_mask is None else pool_mask(valid_mask, ceil)
                # A convolution that pools leaves numbers in the padding, and with an odd size the
                # last row was pooled together with padding.
                x = _apply_mask(x, valid_mask)
            elif layer_type == "fc":
                fc = FullyConnected(features, kernel_size, fc_init, name=name, **options)
                x = fc(x, self.get_variable("packed", name))
            elif layer_type == "drop":
                x = Dropout(self.dropout_rate, self.axis_name, name=name)(x, train)
            if name in targets:
                outputs[name] = x
        return outputs

    @nn.nowrap
    def _pool(self, x: Array, ceil: bool, fuse_relu: bool) -> Array:
        return avg_pool(x) if self.pool == "avg" else max_pool(x, ceil, fuse_relu)

    @nn.nowrap
    def _check_fields(self) -> None:
        if not isinstance(self.config, VGGConfig):
            raise InputError(
                f"config is {self.config!r}: expected a VGGConfig; "
                'pass one of vgg_jax.CONFIGS, such as CONFIGS["D"]'
            )
        for name in ("num_classes", "image_size", "in_channels"):
            value = getattr(self, name)
            if not isinstance(value, numbers.Integral) or isinstance(value, bool):
                raise InputError(f"{name} is {value!r}: expected one integer")
        for name in ("batch_norm", "quick_compile"):
            value = getattr(self, name)
            if not isinstance(value, bool | np.bool_):
                raise InputError(f"{name} is {value!r}: expected True or False")
        for name in ("dtype", "param_dtype"):
            _check_dtype(name, getattr(self, name))
        for name, value, allowed in (
            ("initializer", self.initializer, INITIALIZERS),
            ("pool", self.pool, POOLS),
            ("other_sizes", self.other_sizes, OTHER_SIZES),
        ):
            if value not in tuple(allowed):  # a list has no hash
                raise InputError(f"{name} is {value!r}: expected one of {', '.join(allowed)}")
        _check_in_channels(self.in_channels)
        _check_frozen(self.frozen, self.layers())

    @nn.nowrap
    def _check_ceil(self, ceil: bool) -> None:
        if ceil and self.pool == "avg":
            raise InputError(
                "ceil is set and pool is 'avg': expected pool 'max', the only one that can round up"
            )

    @nn.nowrap
    def _check_variables(self, layers: Sequence[Layer], in_channels: int) -> None:
        """Checks the collections that this call may not add to."""
        all_layers = variable_shapes(self.layers(), self.in_channels)
        for collection, expected in variable_shapes(layers, in_channels).items():
            if not self.is_mutable_collection(collection):
                variables = self.variables.get(collection, {})
                check_layers(collection, variables, expected, all_layers[collection])


def select_layers(
    layers: Sequence[Layer], targets: Sequence[str], start_after: str | None = None
) -> tuple[Layer, ...]:
    """Selects the layers that lead to the targets.

    Args:
        layers: All layers of a net.
        targets: Names of the layers whose output is requested.
        start_after: Name of the layer whose output is the input; None for the whole net.

    Returns:
        The layers after `start_after` up to the deepest target.

    Raises:
        InputError: If a target is unknown, or there is none.
    """
    names = [layer.name for layer in layers]
    unknown = [name for name in targets if name not in names]
    if unknown or not targets:
        raise InputError(
            f"no layer {', '.join(map(repr, unknown)) or 'given'}: this net has {', '.join(names)}"
        )
    start = 0 if start_after is None else names.index(start_after) + 1
    return tuple(layers[start : max(names.index(name) for name in targets) + 1])


def fuse_epilogues(
    layers: Sequence[Layer], targets: Sequence[str], *, fuse_pool: bool, ceil: bool
) -> tuple[PlannedLayer, ...]:
    """Plans which ReLUs and poolings are computed together with the layer before them.

    A layer whose output is a target is not fused with the layer after it.

    Args:
        layers: The layers to run.
        targets: Names of the layers whose output is requested.
        fuse_pool: Poolings may be fused with a ReLU or a convolution.
        ceil: Poolings round up their size; these are not fused into convolutions.

    Returns:
        The plan of each layer:

        - a convolution has the `epilogue` that it computes;
        - a ReLU or pooling that a convolution computes has `is_fused`;
        - a pooling with `fuse_relu` reads the input of the ReLU before it, and applies that ReLU
          itself, so that its gradient stores neither activation.
    """
    plan: list[PlannedLayer] = []
    num_fused = 0
    for i, layer in enumerate(layers):
        if num_fused:
            num_fused -= 1
            plan.append(PlannedLayer(layer, is_fused=True))
        elif layer.type == "conv":
            num_fused = _num_fused(layers[i : i + 3], targets, fuse_pool and not ceil)
            plan.append(PlannedLayer(layer, EPILOGUE_KINDS[num_fused]))
        elif layer.type == "pool" and fuse_pool and _ends_with_relu(plan):
            plan.append(PlannedLayer(layer, fuse_relu=True))
        else:
            plan.append(PlannedLayer(layer))
    return tuple(plan)


def _num_fused(layers: Sequence[Layer], targets: Sequence[str], fuse_pool: bool) -> int:
    """Number of layers after a convolution that it can compute: 0, 1 (ReLU) or 2 (and pooling)."""
    types, names = [layer.type for layer in layers], [layer.name for layer in layers]
    if types[1:2] != ["relu"] or names[0] in targets:
        return 0
    return 2 if fuse_pool and types[2:3] == ["pool"] and names[1] not in targets else 1


def _ends_with_relu(plan: Sequence[PlannedLayer]) -> bool:
    """True if the plan ends with a ReLU that is computed by itself."""
    return bool(plan) and plan[-1].layer.type == "relu" and not plan[-1].is_fused


def _apply_mask(x: Array, valid_mask: Array | None) -> Array:
    """Sets padding to 0: a convolution must see zeros around each image of a canvas."""
    return x if valid_mask is None else jnp.where(valid_mask, x, 0)


def adaptive_avg_pool(x: Array, size: int) -> Array:
    """Average-pools a map of any size to size x size, as PyTorch's AdaptiveAvgPool2d does.

    Output row i is the mean of the rows from floor(i · h / size) to ceil((i + 1) · h / size), and
    likewise for columns.

    Args:
        x: Input (N, h, w, C).
        size: Side of the output.

    Returns:
        Output (N, size, size, C).

    Raises:
        InputError: If h or w is a symbolic size of `jax.export`.
    """
    for axis in (1, 2):
        side = x.shape[axis]
        if not isinstance(side, int):
            raise InputError(
                f"a side of the images is symbolic ({side} after the poolings): other_sizes "
                "'adaptive' needs a fixed size; use 'mean'"
            )
        windows = [(i * side // size, -(-(i + 1) * side // size)) for i in range(size)]
        means = [
            jax.lax.slice_in_dim(x, start, end, axis=axis).mean(axis) for start, end in windows
        ]
        x = jnp.stack(means, axis)
    return x


def _check_shape(x: Array, in_channels: int) -> None:
    if x.ndim != 4 or x.shape[3] != in_channels:
        raise InputError(
            f"the images have the shape {x.shape}: expected (N, H, W, {in_channels}), because "
            f"in_channels is {in_channels}; vgg_jax.with_in_channels adapts a net to other images"
        )
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise InputError(
            f"the images are {x.dtype}: expected floats on the 0-255 scale, minus the mean; "
            "vgg_jax.preprocess makes them"
        )


def _check_dtype(name: str, value: Any) -> None:
    try:
        is_float = jnp.issubdtype(jnp.dtype(value), jnp.floating)
    except TypeError:
        is_float = False
    if not is_float:
        raise InputError(
            f"{name} is {value!r}: expected a type of floats, such as jnp.float32 or jnp.bfloat16"
        )


def _check_in_channels(in_channels: int) -> None:
    if in_channels < 1:
        raise InputError(f"in_channels is {in_channels}: expected at least 1")


def _check_min_size(x: Array, layers: Sequence[Layer]) -> None:
    pools = sum(layer.type == "pool" for layer in layers)
    window = max([1, *(layer.kernel_size for layer in layers if layer.type == "fc")])
    smallest = window * 2**pools
    if any(side < smallest for side in x.shape[1:3]):  # works for jax.export's symbolic sizes
        raise InputError(
            f"the images are {x.shape[1]}x{x.shape[2]}: "
            f"{layers[-1].name} needs at least {smallest}x{smallest}"
        )


def variable_shapes(layers: Iterable[Layer], in_channels: int) -> VariableShapes:
    """Lists the shapes of the variables of layers that follow each other.

    Args:
        layers: The layers, as `layer_table` lists them.
        in_channels: Channels that the first layer reads.

    Returns:
        "params" and "batch_stats", by layer and parameter.
    """
    shapes: VariableShapes = {"params": {}, "batch_stats": {}}
    channels = in_channels
    for layer in layers:
        if layer.type in ("conv", "fc"):
            window = (layer.kernel_size,) * 2
            kernel = (*window, channels) if layer.type == "conv" else (channels * window[0] ** 2,)
            channels = layer.features
            shapes["params"][layer.name] = {"kernel": (*kernel, channels), "bias": (channels,)}
        elif layer.type == "bn":
            shapes["params"][layer.name] = {"scale": (channels,), "bias": (channels,)}
            shapes["batch_stats"][layer.name] = {"mean": (channels,), "var": (channels,)}
    return shapes


def check_layers(
    collection: str,
    layers: Mapping[str, Any],
    expected: Mapping[str, Mapping[str, tuple[int, ...]]],
    all_layers: Collection[str] | None = None,
) -> None:
    """Checks that the expected layers are there, with the expected shapes.

    Args:
        collection: "params" or "batch_stats", for the message.
        layers: Arrays, by layer and parameter.
        expected: Shapes, as `variable_shapes` lists them.
        all_layers: Names of all layers of the net. None accepts layers of any name.

    Raises:
        InputError: A layer is missing, has another shape, or does not belong to the net.
    """
    layers = layers if isinstance(layers, Mapping) else {}
    parameters = {name: set(layer) for name, layer in layers.items() if isinstance(layer, Mapping)}
    missing = [
        name for name, names in expected.items() if names.keys() - parameters.get(name, set())
    ]
    if missing:
        remedy = "expected the variables of this net, as vgg_jax.load or model.init returns them"
        if all(name.startswith("fc") for name in missing):
            remedy = (
                "features up to the last pooling need no fully connected layer, and "
                "vgg_jax.with_new_head adds those that are missing"
            )
        raise InputError(f"{collection} has no {', '.join(missing)}: {remedy}")
    for name, params in expected.items():
        for param, expected_shape in params.items():
            shape = nn.meta.unbox(layers[name][param]).shape
            if shape != expected_shape:
                raise InputError(
                    f"{name}/{param} in {collection} has the shape {shape}: "
                    f"expected {expected_shape}; pass the variables of this net"
                )
    unknown = [name for name in layers if all_layers is not None and name not in all_layers]
    if unknown:
        raise InputError(
            f"{collection} has {', '.join(unknown)}, which this net has not: "
            "expected the variables of this net, as vgg_jax.load or model.init returns them"
        )


def check_net(model: Any, variables: Any) -> None:
    """Checks that a function got a net and its variables, in this order.

    Args:
        model: The first argument.
        variables: The second argument.

    Raises:
        InputError: They have other types.
    """
    if not isinstance(model, VGG) or not isinstance(variables, Mapping):
        raise InputError(
            f"the model is a {type(model).__name__} and its variables are a "
            f"{type(variables).__name__}: expected a vgg_jax.VGG and a dict, in this order"
        )


def _check_frozen(frozen: Sequence[str], layers: Sequence[Layer]) -> None:
    if isinstance(frozen, str):
        raise InputError(f"frozen is the string {frozen!r}: expected a tuple; pass ({frozen!r},)")
    if not isinstance(frozen, Sequence):
        raise InputError(f"frozen is {frozen!r}: expected a tuple of names of layers")
    learned = [layer.name for layer in layers if layer.type in ("conv", "fc", "bn")]
    unknown = [name for name in frozen if name not in learned]
    if unknown:
        raise InputError(
            f"frozen has {', '.join(map(repr, unknown))}: expected some of {', '.join(learned)}"
        )


def transpose_kernels(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Transposes the convolutions, for images that are transposed.

    Args:
        variables: Variables of a net: arrays that this process can read, outside of `jax.jit`.

    Returns:
        Variables that map transposed images (N, W, H, 3) to transposed activations.
    """
    params = variables["params"]
    # By NumPy and `device_put`, which compile nothing (docs/performance.md#first-answer).
    transposed = {
        name: {**layer, "kernel": jax.device_put(np.swapaxes(np.asarray(layer["kernel"]), 0, 1))}
        for name, layer in params.items()
        if name.startswith("conv")
    }
    return {**variables, "params": {**params, **transposed}}


# The fields of VGG but `config`: the arguments of the published networks.
_DOCS = inspect.cleandoc(VGG.__doc__ or "").partition("\n\nRaises:")
_FIELD_DOCS = "".join(_DOCS[0].partition("    num_classes:")[1:])


def _published(
    vgg: Callable[Concatenate[VGGConfig, P], VGG], name: str, net: str, title: str
) -> Callable[P, VGG]:
    """Makes the function `name`, which builds column `net` of Table 1."""
    config = CONFIGS[net]
    num_convs = sum(map(len, config.stages))

    def build(*args: P.args, **fields: P.kwargs) -> VGG:
        return vgg(config, *args, **fields)

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"""Builds {title}, column {net} of Table 1.

It has {num_convs + 3} weight layers: {num_convs} convolutions and 3 fully connected layers.
`{name}(num_classes=10)` is `VGG(CONFIGS["{net}"], num_classes=10)`.

Args:
{_FIELD_DOCS}

Returns:
    The module, without variables.{"".join(_DOCS[1:])}
"""
    parameters = inspect.signature(VGG).parameters
    shown = [parameters[key] for key in parameters if key not in ("config", "parent", "name")]
    signature = inspect.Signature(shown, return_annotation=VGG)
    build.__signature__ = signature  # type: ignore[attr-defined]
    return build


vgg11 = _published(VGG, "vgg11", "A", "VGG-11")
vgg11_lrn = _published(VGG, "vgg11_lrn", "A-LRN", "VGG-11 with local response normalisation")
vgg13 = _published(VGG, "vgg13", "B", "VGG-13")
vgg16_c = _published(VGG, "vgg16_c", "C", "VGG-16 with 1x1 convolutions")
vgg16 = _published(VGG, "vgg16", "D", "VGG-16")
vgg19 = _published(VGG, "vgg19", "E", "VGG-19")

# §3.1: "the first four convolutional layers and the last three fully-connected layers" of A. They
# fit no deeper net by position, since its second convolution reads 64 channels instead of 128. They
# fit all nets by name.
PAPER_INIT_LAYERS = ("conv1_1", "conv2_1", "conv3_1", "conv3_2", "fc6", "fc7", "fc8")


def copy_matching_layers(
    *, source: Mapping[str, Any], target: Mapping[str, Any], layers: Iterable[str] | None = None
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Copies layers of one net into another, where names and shapes match.

    A layer of another shape, such as an fc8 for other classes, stays as it is in the target. The
    batch normalisation after a convolution is copied with it.

    Args:
        source: Variables to copy from, as `vgg_jax.load` returns them.
        target: Variables to copy into, as `model.init` returns them. They are not modified.
        layers: Names of the layers to copy. None means all layers; `PAPER_INIT_LAYERS` are those
            that the paper copies from net A into a deeper net (§3.1).

    Returns:
        The variables of the target with the copied layers, and the names of these layers.

    Raises:
        InputError: An argument has no "params", `layers` is one string, or no layer fits.
    """
    for name, variables in (("source", source), ("target", target)):
        if "params" not in variables:
            raise InputError(
                f"{name} has no 'params', but {', '.join(list(variables)[:3])}: expected the "
                "variables of a net, as `vgg_jax.load` or `model.init` returns them"
            )
    if isinstance(layers, str):
        raise InputError(f"layers is the string {layers!r}: expected a tuple; pass ({layers!r},)")
    old, new = source["params"], target["params"]
    requested = set(new if layers is None else layers)

    def matches(name: str) -> bool:
        return name in old and name in new and _shapes(old[name]) == _shapes(new[name])

    def is_copied(name: str) -> bool:
        conv = name.replace("bn", "conv")
        return bool({name, conv} & requested) and matches(name) and matches(conv)

    copied = tuple(filter(is_copied, new))
    if not copied:
        raise InputError(
            f"no layer fits: expected some of {', '.join(new)} in the source, with equal shapes"
        )
    merged = {**target, "params": {**new, **{name: old[name] for name in copied}}}
    if "batch_stats" in target:
        old_stats, new_stats = source.get("batch_stats", {}), target["batch_stats"]
        stats = {name: old_stats[name] for name in copied if name in old_stats}
        merged["batch_stats"] = {**new_stats, **stats}
    return merged, copied


def with_in_channels(
    model: VGG, variables: Mapping[str, Any], in_channels: int
) -> tuple[VGG, dict[str, Any]]:
    """Adapts a net for RGB images to images with another number of channels.

    Only the kernel of conv1_1 changes. For one channel it is summed over RGB: a grey input gives
    the response of the RGB input that repeats it three times. For C channels it is repeated
    cyclically (R, G, B, R, …), as timm does. The factor 3 / C keeps the scale of the response. A
    record at INFO of the logger `vgg_jax.model` names the change.

    The input stays on the 0-255 scale, minus a mean of each channel. For one channel, that is the
    mean of the three values of `mean_rgb`. For others it is `mean_rgb`, repeated cyclically. A grey
    RGB image minus the three values of `mean_rgb` is tinted; the grey input has no such tint.

    Args:
        model: A net with in_channels 3.
        variables: Its variables. They are not modified.
        in_channels: Channels C of the images.

    Returns:
        The model with `in_channels`, and its variables. `vgg_jax.save` saves them.

    Raises:
        InputError: `in_channels` is below 1, the net reads other images than RGB, or the variables
            have no conv1_1 for them. Or the arguments are not a net and its variables.
    """
    check_net(model, variables)
    _check_in_channels(in_channels)
    if model.in_channels != 3:
        raise InputError(
            f"the model's in_channels is {model.in_channels}: expected 3; adapt the RGB net"
        )
    params = variables.get("params", {})
    expected = variable_shapes(model.layers(), 3)["params"]["conv1_1"]
    check_layers("params", params, {"conv1_1": expected})
    kernel = jnp.asarray(params["conv1_1"]["kernel"])
    if in_channels == 1:
        kernel, change = kernel.sum(2, keepdims=True), "summed over RGB"
    else:
        kernel = kernel[:, :, jnp.arange(in_channels) % 3] * (3 / in_channels)
        change = f"repeated cyclically over RGB and multiplied by 3 / {in_channels}"
    logger.info(f"in_channels is {in_channels} instead of 3: the kernel of conv1_1 is {change}")
    conv1 = {**params["conv1_1"], "kernel": kernel}
    adapted = {**variables, "params": {**params, "conv1_1": conv1}}
    return model.clone(in_channels=in_channels), adapted


def with_new_head(
    model: VGG, variables: Mapping[str, Any], num_classes: int, key: Array
) -> tuple[VGG, dict[str, Any]]:
    """Replaces fc8 by a new one for other classes.

    All other layers are kept, and share their arrays with `variables`. Fully connected layers that
    the variables lack are new as well. New layers are drawn by the model's `initializer`. They are
    trained: the new model's `frozen` leaves them out. Records at INFO of the logger
    `vgg_jax.model` name the new layers, and those that are no longer frozen.

    `vgg_jax.save` needs the names of the new classes, `metadata | {"classes": names}`. If the
    number of classes stays the same, it would save the old names without an error.

    Args:
        model: The net.
        variables: Its variables. They are not modified.
        num_classes: Number of classes of the new head.
        key: Random key of the new layers.

    Returns:
        The model with `num_classes` and without the new layers in `frozen`, and its variables.

    Raises:
        InputError: `num_classes` is below 1, or the variables lack convolutions of the net or have
            other shapes. Or the arguments are not a net and its variables.
    """
    check_net(model, variables)
    new_model = model.clone(num_classes=num_classes)
    shapes = variable_shapes(new_model.layers(), model.in_channels)
    old = {collection: variables.get(collection, {}) for collection in shapes}
    params = old["params"]
    new = [name for name in ("fc6", "fc7", "fc8") if name == "fc8" or name not in params]
    for collection, layers in shapes.items():
        kept = {name: layer for name, layer in layers.items() if name not in new}
        check_layers(collection, old[collection], kept)
    _, initializer = INITIALIZERS[model.initializer](model.initializer_std)
    head = {}
    for name in new:
        layer = shapes["params"][name]
        # The draw of a layer does not depend on which others are new.
        layer_key = jax.random.fold_in(key, int(name.removeprefix("fc")))
        head[name] = {
            "kernel": initializer(layer_key, layer["kernel"], model.param_dtype),
            "bias": jnp.zeros(layer["bias"], model.param_dtype),
        }
    logger.info(
        f"new head for {num_classes} classes: newly initialised {', '.join(new)} "
        f"({model.initializer}); all other layers are kept"
    )
    thawed = [name for name in model.frozen if name in new]
    if thawed:
        logger.info(f"no longer frozen, because new: {', '.join(thawed)}")
    frozen = tuple(name for name in model.frozen if name not in new)
    return new_model.clone(frozen=frozen), {**variables, "params": {**params, **head}}


def _shapes(layer: Mapping[str, Array] | FrozenDict) -> dict[str, tuple[int, ...]]:
    return {name: value.shape for name, value in layer.items()}


def build_model(config: TrainConfig, num_classes: int) -> VGG:
    """Builds the net that a training configuration describes.

    Args:
        config: Training configuration.
        num_classes: Number of classes.

    Returns:
        The module, without variables.
    """
    return VGG(
        config=config.vgg,
        num_classes=num_classes,
        batch_norm=config.batch_norm,
        dropout_rate=config.dropout_rate,
        dtype=jnp.dtype(config.dtype),
        image_size=config.image_size,
        initializer=config.initializer,
        initializer_std=config.initializer_std,
        frozen=config.frozen,
    )
