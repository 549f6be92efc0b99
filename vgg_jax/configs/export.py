"""Contents and layouts of exported files."""

EXPORT_OUTPUTS = ("logits", "posteriors", "score_map")  # outputs of an exported program
SAVE_LAYOUTS = ("vgg_jax", "torchvision", "timm")  # tensor names and axis orders in .safetensors
