"""Prints by how many kilobytes the peak memory grows in an epoch: … -m <this module> FOLDER."""

import resource
import sys

from vgg_jax import IMAGENET, TrainConfig
from vgg_jax.data import open_split, train_batches


def peak_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


config = TrainConfig(image_size=32, scale=(32,), batch_size=4, epochs=1, skip_bad=True)
source = open_split(sys.argv[1], "train", skip_bad=True)
before = peak_memory()
assert sum(batch["mask"].sum() for batch in train_batches(source, config, IMAGENET)) == 10
print(peak_memory() - before)
