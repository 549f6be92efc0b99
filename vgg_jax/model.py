"""VGG as a Flax linen module: Table 1 of the paper, read layer by layer, and its initialisation (§3.1)."""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax.core import FrozenDict
from jax import Array

from vgg_jax.configs.models import CONFIGS, Layer, VGGConfig, layer_table
from vgg_jax.configs.train import TrainConfig
from vgg_jax.errors import InputError
from vgg_jax.layers import BatchNorm, Conv, Dropout, FullyConnected, local_response_norm
from vgg_jax.ops.epilogue import THEN
from vgg_jax.ops.pooling import avg_pool, max_pool, pool_mask, relu

# Of the kernels, (convolutions', fully connected layers'); biases start at 0.
INITIALIZERS: dict[
    str, Callable[[float], tuple[nn.initializers.Initializer, nn.initializers.Initializer]]
] = {
    # §3.1: a normal of "variance 10⁻²". That explodes even in A (deviation 0.1 multiplies the signal by 6e5), while deviation 0.01 trains
    # in A and vanishes in the deeper nets: the paper's story. So 10⁻² is read as the deviation, as Krizhevsky's is.
    "paper": lambda std: (nn.initializers.normal(std), nn.initializers.normal(std)),
    # The paper's note after submission: with this no net needs pre-training.
    "glorot": lambda std: (nn.initializers.glorot_uniform(), nn.initializers.glorot_uniform()),
    # torchvision's: for inputs of unit variance. On 0-255 pixels it diverges at the paper's learning rate without batch normalisation.
    "he": lambda std: (
        nn.initializers.variance_scaling(2.0, "fan_out", "normal"),
        nn.initializers.normal(0.01),
    ),
}

POOLS = ("max", "avg")


class VGG(nn.Module):
    """The networks of Simonyan & Zisserman (arXiv 1409.1556), Table 1.

    Images are float RGB on the 0-255 scale with the mean RGB value subtracted, (N, H, W, 3).
    Parameters: `params/conv1_1/{kernel,bias}` … `params/fc8/{kernel,bias}`; with batch_norm also `params/bn1_1/{scale,bias}` and
    `batch_stats/bn1_1/{mean,var}`. One parameter set serves `__call__`, `score_map` and `features`.
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
    frozen: tuple[str, ...] = ()  # layers that training leaves as they are
    pool: str = "max"  # or "avg", smoother gradients for textures (Gatys et al., arXiv 1508.06576)
    axis_name: str | None = (
        None  # of the shard_map around it that spreads the examples: training is then that of the whole batch
    )

    def __call__(self, images: Array, train: bool = False, mask: Array | None = None) -> Array:
        """Logits (N, K) of images (N, image_size, image_size, 3).

        With `train` dropout is on (needs a "dropout" rng) and batch normalisation uses the batch's statistics, those of the
        examples where `mask` (N,) is true (needs `mutable=["batch_stats"]`). Raises InputError for images of another size.
        """
        size = self.image_size
        _check_shape(images)
        if images.shape[1:3] != (size, size):
            raise InputError(
                f"the images are {images.shape[1]}x{images.shape[2]}: this net gives logits of {size}x{size} images; "
                f'rescale and crop them, or use method="score_map" for larger ones'
            )
        return self._forward(images, ("fc8",), train, mask)["fc8"][:, 0, 0]

    def score_map(self, images: Array, ceil: bool = False) -> Array:
        """The dense class-score map (N, h, w, K) of images of at least image_size (§3.2): the logits of every window, stride 32.

        `score_map_size` are its sides; with `ceil` poolings round up, as Caffe's. Raises InputError for images smaller than image_size.
        """
        return self._forward(images, ("fc8",), ceil=ceil)["fc8"]

    @nn.nowrap
    def score_map_size(self, h: int, w: int, ceil: bool = False) -> tuple[int, int]:
        """The sides of the score map of an image: h // 32 - image_size // 32 + 1 positions; with `ceil` h / 32 is rounded up."""
        stride = 2 ** len(self.config.stages)
        h, w = (-(-side // stride) if ceil else side // stride for side in (h, w))
        return h - self.image_size // stride + 1, w - self.image_size // stride + 1

    def trunk(self, images: Array, there: Array, ceil: bool = False) -> Array:
        """(N, h, w, C), what the last pooling reads, of arrays that hold several images each, and zeros.

        `there`, bool (N, H, W), says which pixels are an image's. Between two images there must be room, see `vgg_jax.evaluation.packing`: then
        each image's part of the map is what the image alone would give, with zeros around it.
        """
        layer = self._trunk_end()
        return self._forward(images, (layer,), there=there[..., None], ceil=ceil)[layer]

    def head(self, maps: Array) -> Array:
        """(N, K), of parts (N, h, w, C) of `trunk` as large as those of an image of image_size."""
        return self._forward(maps, ("fc8",), start_after=self._trunk_end())["fc8"][:, 0, 0]

    @nn.nowrap
    def _trunk_end(self) -> str:
        """The name of the layer that the last pooling reads."""
        names = [
            layer.name
            for layer in layer_table(
                self.config, self.num_classes, self.batch_norm, self.image_size
            )
        ]
        return names[names.index(f"pool{len(self.config.stages)}") - 1]

    def features(self, images: Array, layers: Iterable[str]) -> dict[str, Array]:
        """The named activations, each a map (N, h, w, C), of images of any size that reaches the deepest one, where the net stops.

        "conv3_3" and "fc7" are taken before their ReLU, "relu3_3" and "relu7" behind it. Raises InputError for an unknown layer
        (the message lists the layers there are) or an image too small (it names the smallest size).
        """
        return self._forward(images, tuple(layers))

    @nn.compact
    def _forward(
        self,
        x: Array,
        wanted: tuple[str, ...],
        train: bool = False,
        mask: Array | None = None,
        there: Array | None = None,
        ceil: bool = False,
        start_after: str | None = None,
    ) -> dict[str, Array]:
        table = layer_table(self.config, self.num_classes, self.batch_norm, self.image_size)
        names = [layer.name for layer in table]
        table = table[
            names.index(start_after) + 1 if start_after else 0 : _deepest(wanted, names) + 1
        ]
        if start_after is None:
            _check_shape(x)
        _check_min_size(x, table)
        for name, allowed in (("initializer", INITIALIZERS), ("pool", POOLS)):
            if getattr(self, name) not in allowed:
                raise InputError(
                    f"{name} is {getattr(self, name)!r}: expected one of {', '.join(allowed)}"
                )
        if ceil and self.pool == "avg":
            raise InputError(
                "ceil is set and pool is 'avg': expected pool 'max', which alone Caffe's rounding is defined for here"
            )
        conv_init, fc_init = INITIALIZERS[self.initializer](self.initializer_std)
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        found = {}

        def clear(x: Array) -> Array:
            """Zeros around each image, as a convolution of the image alone would find there."""
            return x if there is None else jnp.where(there, x, 0)

        x, linear = clear(x), None  # what the ReLU just before has read
        along = 0
        for place, (name, kind, width, kernel) in enumerate(table):
            if along:  # done with its convolution
                along -= 1
            elif kind == "conv":
                along = _done_along(
                    table[place : place + 3],
                    wanted,
                    pools=self.pool == "max" and there is None and not ceil,
                )
                layer = Conv(width, kernel, kernel_init=conv_init, name=name, **types)
                x = layer(
                    x, self.get_variable("packed", name), there if along else None, THEN[along]
                )
            elif kind == "bn":
                x = BatchNorm(axis_name=self.axis_name, name=name, **types)(
                    x, train and name not in self.frozen, mask
                )
            elif kind == "relu":
                linear, x = x, clear(relu(x))
            elif kind == "lrn":
                x = local_response_norm(x)
            elif kind == "pool":
                if self.pool == "avg":
                    x = avg_pool(x)
                elif linear is not None and there is None:
                    x = max_pool(
                        linear, ceil, fuse_relu=True
                    )  # ReLU and pooling in one: a gradient then keeps neither map
                else:
                    x = max_pool(x, ceil)
                there = None if there is None else pool_mask(there, ceil)
                x = clear(x)  # of an odd side the last row was pooled with a zero
            elif kind == "fc":
                x = FullyConnected(width, kernel, kernel_init=fc_init, name=name, **types)(
                    x, self.get_variable("packed", name)
                )
            elif kind == "drop":
                x = Dropout(self.dropout_rate, self.axis_name, name=name)(x, train)
            if name in wanted:
                found[name] = x
            if kind != "relu":
                linear = None
        return found


def transpose_kernels(variables: Mapping[str, Any]) -> dict[str, Any]:
    """The variables with which the convolutions give for transposed images, (N, W, H, 3), the transposed maps."""
    turned = {
        name: {**layer, "kernel": layer["kernel"].swapaxes(0, 1)}
        for name, layer in variables["params"].items()
        if name.startswith("conv")
    }
    return {**variables, "params": {**variables["params"], **turned}}


def _deepest(wanted: tuple[str, ...], names: list[str]) -> int:
    unknown = [name for name in wanted if name not in names]
    if unknown or not wanted:
        raise InputError(
            f"no layer {', '.join(map(repr, unknown)) or 'given'}: this net has {', '.join(names)}"
        )
    return max(names.index(name) for name in wanted)


def _done_along(table: tuple[Layer, ...], wanted: tuple[str, ...], pools: bool) -> int:
    """How many of the layers behind the first, a convolution, are done with it: a ReLU, or a ReLU and a pooling, if nobody wants less."""
    kinds, names = [layer.type for layer in table], [layer.name for layer in table]
    if kinds[1:2] != ["relu"] or names[0] in wanted:
        return 0
    return 2 if pools and kinds[2:3] == ["pool"] and names[1] not in wanted else 1


def _check_shape(x: Array) -> None:
    if x.ndim != 4 or x.shape[3] != 3:
        raise InputError(f"the images have the shape {x.shape}: expected (N, H, W, 3)")


def _check_min_size(x: Array, table: tuple) -> None:
    pools = sum(layer.type == "pool" for layer in table)
    smallest = max([1, *(layer.kernel_size for layer in table if layer.type == "fc")]) * 2**pools
    if any(side < smallest for side in x.shape[1:3]):  # also decided for symbols of jax.export
        raise InputError(
            f"the images are {x.shape[1]}x{x.shape[2]}: {table[-1].name} needs at least {smallest}x{smallest}"
        )


vgg11 = functools.partial(VGG, CONFIGS["A"])
vgg11_lrn = functools.partial(VGG, CONFIGS["A-LRN"])
vgg13 = functools.partial(VGG, CONFIGS["B"])
vgg16_c = functools.partial(VGG, CONFIGS["C"])
vgg16 = functools.partial(VGG, CONFIGS["D"])
vgg19 = functools.partial(VGG, CONFIGS["E"])

# §3.1: "the first four convolutional layers and the last three fully-connected layers" of A. By position they fit no deeper net
# (its second convolution reads 64 channels, not 128's); by name they fit all.
PAPER_INIT_LAYERS = ("conv1_1", "conv2_1", "conv3_1", "conv3_2", "fc6", "fc7", "fc8")


def copy_matching_layers(
    source: Mapping[str, Any], params: Mapping[str, Any], layers: Iterable[str] = PAPER_INIT_LAYERS
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """`params` with the named layers of `source` in place of their own, and the names of those that were copied (§3.1).

    Copied is a layer that both have with equal shapes, with the batch normalisation behind it; another (an fc8 for other classes) stays.
    Works for `params` and for `batch_stats`.
    """

    def fits(name: str) -> bool:
        return name in source and name in params and _shapes(source[name]) == _shapes(params[name])

    # In batch_stats no convolution is a name: there the caller's word is taken.
    wanted = {
        name
        for layer in layers
        if fits(layer) or layer not in params
        for name in (layer, layer.replace("conv", "bn"))
    }
    copied = tuple(name for name in params if name in wanted and fits(name))
    return {
        name: source[name] if name in copied else value for name, value in params.items()
    }, copied


def _shapes(layer: Mapping[str, Array] | FrozenDict) -> dict[str, tuple[int, ...]]:
    return {name: value.shape for name, value in layer.items()}


def build_model(config: TrainConfig, num_classes: int) -> VGG:
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
