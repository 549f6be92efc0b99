"""The 1,000 classes of ImageNet, in the order of the released models.

The order is that of Caffe's synset_words.txt: by WordNet id.
"""

from importlib import resources

# "n01440764 tench, Tinca tinca": image folders and TensorFlow Datasets name a class by its id.
CLASSES = tuple(
    resources.files("vgg_jax.weights").joinpath("imagenet_classes.txt").read_text().splitlines()
)
