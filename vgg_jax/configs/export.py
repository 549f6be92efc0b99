"""What an exported file can hold."""

EXPORT_OUTPUTS = ("logits", "posteriors", "score_map")  # of an exported program


SAVE_LAYOUTS = (
    "vgg_jax",
    "torchvision",
    "timm",
)  # whose names and order a .safetensors file can be written in
