"""Table 1."""

import pytest

from vgg_jax import CONFIGS, Conv, InputError, VGGConfig
from vgg_jax.configs.models import layer_table

CONV_LAYERS = {"A": 8, "A-LRN": 8, "B": 10, "C": 13, "D": 13, "E": 16, "B-5x5": 5}


def test_configs_convolution_counts():
    assert CONFIGS.keys() == CONV_LAYERS.keys()
    for net, count in CONV_LAYERS.items():
        assert sum(layer.type == "conv" for layer in layer_table(CONFIGS[net])) == count


def test_configs_only_c_has_1x1_convolutions():
    """They end its last three stages."""
    for net, config in CONFIGS.items():
        names = [
            layer.name
            for layer in layer_table(config)
            if layer.type == "conv" and layer.kernel_size == 1
        ]
        assert names == (["conv3_3", "conv4_3", "conv5_3"] if net == "C" else [])


@pytest.mark.parametrize("conv", [Conv(8, 2), Conv(8, 4), Conv(8, 0), Conv(8, -3), Conv(0, 3)])
def test_config_rejects_convolution(conv):
    message = rf"conv2_1 has kernel_size {conv.kernel_size} and {conv.features} features"
    with pytest.raises(InputError, match=message):
        VGGConfig(((Conv(8),), (conv,)))


def test_layer_table_names():
    names = [layer.name for layer in layer_table(CONFIGS["A-LRN"], batch_norm=True)]
    assert names[:6] == ["conv1_1", "bn1_1", "relu1_1", "lrn1_1", "pool1", "conv2_1"]
    assert names[-8:] == ["pool5", "fc6", "relu6", "drop6", "fc7", "relu7", "drop7", "fc8"]


def test_layer_table_rejects_empty_maps():
    with pytest.raises(InputError, match="image_size is 31: expected at least 32"):
        layer_table(CONFIGS["A"], image_size=31)
    with pytest.raises(InputError, match="num_classes is 0: expected at least 1"):
        layer_table(CONFIGS["A"], num_classes=0)
