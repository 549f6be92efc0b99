"""Uses the package as if those of vgg-jax[train] were missing; ends with the command `train`."""

import pydoc
import sys
import tempfile
from pathlib import Path
from unittest import mock

HIDDEN = ("tensorflow", "tensorflow_datasets", "sklearn", "tqdm", "optax", "orbax")
sys.modules |= dict.fromkeys(HIDDEN)

import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402

import vgg_jax  # noqa: E402
from vgg_jax.cli import main  # noqa: E402

fields = {"mean_rgb": (1, 2, 3), "image_size": 16, "scale": 18, "exif": True}
metadata = {"net": "shallow", "classes": tuple("abcdef"), "preprocessing": fields}
with tempfile.TemporaryDirectory() as folder:
    photo, weights = str(Path(folder, "photo.jpg")), str(Path(folder, "net.safetensors"))
    Image.fromarray(np.full((20, 30, 3), 77, np.uint8)).save(photo)
    if not np.all(np.abs(vgg_jax.preprocess(photo, metadata) - [76, 75, 74]) <= 1):
        raise SystemExit("preprocess failed")
    if "jax" in sys.modules:
        raise SystemExit("preprocess imported jax")

    from tests.helpers.tiny import SHALLOW, init

    vgg_jax.CONFIGS["shallow"] = SHALLOW
    model = vgg_jax.VGG(SHALLOW, 6, image_size=16)
    vgg_jax.save(weights, model, init(model), metadata)
    for protocol in ("dense", "both"):
        command = ["predict", weights, photo, "--protocol", protocol, "--scales", "16", "20"]
        if main(command) != 0:
            raise SystemExit("predict failed")

vgg_jax.export.export.__call__  # noqa: B018 - without an import of the subpackage
pydoc.render_doc(vgg_jax)


def fit_without_optax():
    """As if orbax were there."""
    sys.modules["vgg_jax.runs.checkpoint"] = mock.MagicMock()
    try:
        vgg_jax.fit(vgg_jax.preset("digits"), "runs/none")
    finally:
        del sys.modules["vgg_jax.runs.checkpoint"]


for call in (
    lambda: vgg_jax.fit(vgg_jax.preset("digits"), "runs/none"),
    fit_without_optax,
    lambda: vgg_jax.evaluate(model, init(model), metadata, "digits"),
):
    try:
        call()
    except vgg_jax.InputError as error:
        print(error)
if main(["summary", "A"]) != 0:
    raise SystemExit("summary failed")
sys.exit(main(["train"]))
