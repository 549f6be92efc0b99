"""Pictures and records of what a net is trained on and does."""

from vgg_jax.reporting.contact_sheet import preview

__all__ = ["preview"]
