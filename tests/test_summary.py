"""Parameters, multiply-adds and memory against published tables."""

import jax
import jax.numpy as jnp
import pytest

from vgg_jax import CONFIGS, VGG
from vgg_jax.summary import summarize, table, totals

# net: parameters, parameters with batch norm, multiply-adds, receptive fields at pool5 and of fc6
COUNTS = {
    "A": (132_863_336, 132_868_840, 7_609_090_048, 150, 342),
    "A-LRN": (132_863_336, 132_868_840, 7_609_090_048, 150, 342),
    "B": (133_047_848, 133_053_736, 11_308_466_176, 156, 348),
    "C": (133_638_952, 133_647_400, 11_770_888_192, 156, 348),
    "D": (138_357_544, 138_365_992, 15_470_264_320, 212, 404),
    "E": (143_667_240, 143_678_248, 19_632_062_464, 268, 460),
    "B-5x5": (134_503_528, 134_506_472, 9_356_017_664, 156, 348),
}
# net: torchsummary's rows, forward/backward MB, parameters MB, total MB; plain and with batch norm
TORCHSUMMARY = {
    "A": ((28, 125.18, 506.83, 632.59), (36, 181.84, 506.85, 689.27)),
    "B": ((32, 198.68, 507.54, 706.79), (42, 292.09, 507.56, 800.22)),
    "C": ((38, 218.59, 509.79, 728.96), (51, 321.95, 509.82, 832.35)),
    "D": ((38, 218.59, 527.79, 746.96), (51, 321.95, 527.82, 850.35)),
    "E": ((44, 238.50, 548.05, 787.12), (60, 351.81, 548.09, 900.47)),
}
PARAMS_OF_TEN_CLASSES = {
    "A": 128_807_306,
    "B": 128_991_818,
    "C": 129_582_922,
    "D": 134_301_514,
    "E": 139_611_210,
}


def test_expected_tables_are_complete():
    assert COUNTS.keys() == CONFIGS.keys()
    # No printout of the other two was published.
    assert TORCHSUMMARY.keys() == CONFIGS.keys() - {"A-LRN", "B-5x5"}


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("net", CONFIGS)
def test_summarize_counts(net, batch_norm):
    """The counts equal the published ones and those of the module."""
    layers = summarize(CONFIGS[net], batch_norm=batch_norm)
    params, params_with_batch_norm, macs, pool5, fc6 = COUNTS[net]
    assert totals(layers)["params"] == (params_with_batch_norm if batch_norm else params)
    assert totals(layers)["macs"] == macs
    fields = {layer.name: layer.receptive_field for layer in layers}
    assert (fields["pool5"], fields["fc6"]) == (pool5, fc6)

    model = VGG(CONFIGS[net], batch_norm=batch_norm)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)))["params"]
    modules = {name: sum(x.size for x in jax.tree.leaves(layer)) for name, layer in shapes.items()}
    assert modules == {layer.name: layer.params for layer in layers if layer.params}


@pytest.mark.parametrize("net", TORCHSUMMARY)
def test_totals_match_torchsummary(net):
    for batch_norm, (rows, forward_backward, params, total) in zip(
        (False, True), TORCHSUMMARY[net], strict=True
    ):
        layers = summarize(CONFIGS[net], batch_norm=batch_norm)
        megabytes = totals(layers)
        assert len(layers) == rows
        assert round(megabytes["input_mb"], 2) == 0.57
        assert round(megabytes["forward_backward_mb"], 2) == forward_backward
        assert round(megabytes["params_mb"], 2) == params
        assert round(megabytes["total_mb"], 2) == total


@pytest.mark.parametrize("net", PARAMS_OF_TEN_CLASSES)
def test_totals_of_ten_classes(net):
    assert totals(summarize(CONFIGS[net], 10))["params"] == PARAMS_OF_TEN_CLASSES[net]


def test_table_has_layers_and_totals():
    text = table(CONFIGS["D"], batch_norm=True)
    assert "conv3_3" in text
    assert "Total params: 138,365,992\n" in text
    assert "Input size (MB): 0.57" in text
    assert "pass size (MB): 321.95" in text
    assert "Params size (MB): 527.82" in text
    assert "Total Size (MB): 850.35" in text


def test_summary_of_other_channels():
    """As many parameters as the module has; the input has one channel."""
    layers = summarize(CONFIGS["A"], in_channels=1)
    model = VGG(CONFIGS["A"], in_channels=1)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 224, 224, 1)))
    params = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert totals(layers, in_channels=1)["params"] == params == COUNTS["A"][0] - 2 * 9 * 64
    assert totals(layers, in_channels=1)["input_mb"] == 224 * 224 * 4 / 2**20
    assert "Input size (MB): 0.19" in table(CONFIGS["A"], in_channels=1)
