"""SavedModels in TF Serving's form and in LiteRT."""

import numpy as np
import pytest

from tests.helpers.compare import assert_close_to_largest
from tests.helpers.export_files import (
    own_output,
    random_images,
    random_weights,
)
from vgg_jax import IMAGENET
from vgg_jax.export import ExportSpec, write


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*tf.lite.Interpreter is deprecated:UserWarning")
def test_savedmodel_in_litert(tmp_path):
    import tensorflow as tf

    spec = ExportSpec(random_weights("A"), uint8=False)
    write(tmp_path / "net.savedmodel", spec)
    converter = tf.lite.TFLiteConverter.from_saved_model(str(tmp_path / "net.savedmodel"))
    interpreter = tf.lite.Interpreter(model_content=converter.convert())
    images = random_images(1, 32, 32).astype(np.float32) - np.float32(IMAGENET.mean_rgb)
    signature = interpreter.get_signature_runner("serving_default")
    assert_close_to_largest(signature(images=images)["logits"], own_output(spec, images))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*tf.lite.Interpreter is deprecated:UserWarning")
@pytest.mark.parametrize("output", ["logits", "posteriors"])
def test_litert_refuses_other_sizes(output, tmp_path):
    """LiteRT computes on images of any size, and a convolution of too small ones crashed."""
    import tensorflow as tf

    spec = ExportSpec(random_weights("A", size=64), output)
    write(tmp_path / "net.savedmodel", spec)
    converter = tf.lite.TFLiteConverter.from_saved_model(str(tmp_path / "net.savedmodel"))
    content = converter.convert()

    def run(images):
        signature = tf.lite.Interpreter(model_content=content).get_signature_runner()
        return signature(images=images)[output]

    larger = [(100, 80), (70, 70), (64, 65)]
    sizes = [(1, 1), (64, 1), (32, 32), (63, 80), (80, 63), (32, 128)]
    for size in sizes + larger * (output == "logits"):
        with pytest.raises(RuntimeError, match=r"CONCATENATION|RESHAPE"):
            run(random_images(2, *size))
    for size in [(64, 64), *larger * (output == "posteriors")]:
        images = random_images(2, *size)
        assert_close_to_largest(run(images), own_output(spec, images))


def test_savedmodel_fits_tf_serving(tmp_path):
    """Its tag, signature and batch size; no operation that a server without Python lacks."""
    from tensorflow.core.protobuf import saved_model_pb2

    write(tmp_path / "net.savedmodel", ExportSpec(random_weights("A-LRN")))
    content = (tmp_path / "net.savedmodel" / "saved_model.pb").read_bytes()
    (graph,) = saved_model_pb2.SavedModel.FromString(content).meta_graphs
    assert list(graph.meta_info_def.tags) == ["serve"]
    signature = graph.signature_def["serving_default"]
    assert signature.method_name == "tensorflow/serving/predict"
    assert shapes(signature.inputs) == {"images": [-1, 32, 32, 3]}
    assert shapes(signature.outputs) == {"logits": [-1, 3]}
    operations = {operation.name for operation in graph.meta_info_def.stripped_op_list.op}
    assert {"Conv2D", "LRN", "MaxPool"} <= operations
    assert not {name for name in operations if "Py" in name or "Xla" in name}


def shapes(infos):
    return {name: [dim.size for dim in info.tensor_shape.dim] for name, info in infos.items()}
