"""Reads events by TensorBoard's own reader."""

from typing import Any


def read(folder: Any) -> Any:
    """All events of a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0})
    return reader.Reload()


def read_scalars(folder: Any) -> dict[str, dict[int, float]]:
    """The values by curve and step. Each step is there once."""
    reader, curves = read(folder), {}
    for tag in reader.Tags()["scalars"]:
        points = [(point.step, point.value) for point in reader.Scalars(tag)]
        curves[tag] = dict(points)
        assert len(curves[tag]) == len(points), tag
    return curves


def read_images(folder: Any, tag: str) -> list[tuple[int, bytes]]:
    """The step and the PNG file of each image."""
    return [(image.step, image.encoded_image_string) for image in read(folder).Images(tag)]
