"""What an exported file can hold."""

OUTPUTS = ("logits", "posteriors", "score_map")  # of an exported program


WRITTEN = (
    "vgg_jax",
    "torchvision",
    "timm",
)  # whose names and order a .safetensors file can be written in
