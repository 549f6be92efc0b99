"""`help` explains each field of the nets and of the configurations."""

import copy
import dataclasses
import inspect
import pickle
import pydoc
import re

import pytest

import vgg_jax
from vgg_jax import CONFIGS, VGG, ColourStatistics, Conv, TrainConfig, VGGConfig
from vgg_jax.configs.evaluation import EvalProtocol
from vgg_jax.distributed.sharding import MeshConfig
from vgg_jax.export import ExportSpec
from vgg_jax.training.trainer import FitResult

PUBLISHED = {  # net, weight layers
    "vgg11": ("A", 11),
    "vgg11_lrn": ("A-LRN", 11),
    "vgg13": ("B", 13),
    "vgg16_c": ("C", 16),
    "vgg16": ("D", 16),
    "vgg19": ("E", 19),
}
CLASSES = (
    VGG,
    TrainConfig,
    EvalProtocol,
    MeshConfig,
    VGGConfig,
    Conv,
    ColourStatistics,
    ExportSpec,
    FitResult,
)


def field_names(cls):
    """Names of the fields, without those of every linen module."""
    if hasattr(cls, "_fields"):
        return list(cls._fields)
    inherited = ("parent", "name") if cls is VGG else ()
    return [field.name for field in dataclasses.fields(cls) if field.name not in inherited]


def explained(thing, heading):
    """Names with an explanation below a heading of the help, in order."""
    text = pydoc.render_doc(thing, renderer=pydoc.plaintext)
    lines = [re.sub(r"^ \|  |^    ", "", line) for line in text.splitlines()]
    start = lines.index(f"{heading}:") + 1
    names = []
    for line in lines[start:]:
        if not line.startswith("    "):
            break
        if match := re.match(r"    (\w+): \w*\S* \S+", line):
            names.append(match[1])
        else:
            assert re.match(r"        \S", line), line
    return names


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_help_explains_fields(cls):
    assert explained(cls, "Attributes") == field_names(cls)


@pytest.mark.parametrize("name", PUBLISHED)
def test_help_explains_published_nets(name):
    function, (net, depth) = getattr(vgg_jax, name), PUBLISHED[name]
    assert explained(function, "Args") == field_names(VGG)[1:]
    text = pydoc.render_doc(function, renderer=pydoc.plaintext)
    assert text.startswith(f"Python Library Documentation: function {name} in module vgg_jax.model")
    assert f", column {net} of Table 1." in text
    assert f"It has {depth} weight layers: {depth - 3} convolutions and 3 fully" in text
    assert f'`{name}(num_classes=10)` is `VGG(CONFIGS["{net}"], num_classes=10)`.' in text


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_nets_take_the_fields(name):
    function, config = getattr(vgg_jax, name), CONFIGS[PUBLISHED[name][0]]
    expected = inspect.signature(VGG).parameters
    signature = inspect.signature(function)
    assert signature.return_annotation is VGG
    assert list(signature.parameters) == field_names(VGG)[1:]
    for field, parameter in signature.parameters.items():
        assert parameter == expected[field]
    assert function() == VGG(config)
    assert function(10, True, pool="avg") == VGG(config, 10, True, pool="avg")
    assert function(name="backbone").name == "backbone"
    with pytest.raises(TypeError, match="multiple values for argument 'config'"):
        function(config=config)
    with pytest.raises(TypeError, match="unexpected keyword argument 'num_clases'"):
        function(num_clases=10)
    assert pickle.loads(pickle.dumps(function)) is function
    assert copy.deepcopy(function) is function
