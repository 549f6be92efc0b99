"""The 1,000 classes of ImageNet, in the order of the released models: by WordNet id, as in Caffe's synset_words.txt."""

from importlib import resources

# "n01440764 tench, Tinca tinca": the id is what folders and TensorFlow Datasets call a class.
CLASSES = tuple(
    resources.files("vgg_jax.weights").joinpath("imagenet_classes.txt").read_text().splitlines()
)
