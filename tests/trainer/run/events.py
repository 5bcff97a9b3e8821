"""TensorBoard's event files, read back as TensorBoard reads them: record by record, with the checksums compared."""

import struct
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import matplotlib.image
import numpy as np
from tensorboardX.crc32c import crc32c
from tensorboardX.proto.event_pb2 import Event  # type: ignore[attr-defined]

EventKey = tuple[str, int]  # (tag, step)


def read_events(folder: Path) -> Iterator[Event]:
    """All events of all files, in the files' order; a record is length, its checksum, the event, its checksum."""
    for path in sorted(folder.iterdir()):
        data, at = path.read_bytes(), 0
        while at + 8 <= len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            if at + 16 + length > len(data):
                break  # what a killed process or a full disk left unfinished: TensorBoard passes over it, too
            event = data[at + 12 : at + 12 + length]
            assert struct.unpack_from("<I", data, at + 8) == (_masked(data[at : at + 8]),), path
            assert struct.unpack_from("<I", data, at + 12 + length) == (_masked(event),), path
            yield Event.FromString(event)
            at += 16 + length


def logged_scalars(folder: Path) -> dict[EventKey, float]:
    """What TensorBoard would plot: of a step that was logged twice, the later value, and nothing that was purged."""
    found: dict[EventKey, float] = {}
    for event in read_events(folder):
        if event.HasField("session_log") and event.session_log.status == event.session_log.START:
            found = {place: value for place, value in found.items() if place[1] < event.step}
        found |= {
            (value.tag, event.step): value.simple_value for value in event.summary.value if not value.HasField("image")
        }
    return found


def logged_images(folder: Path) -> Iterator[tuple[str, int, np.ndarray]]:
    """Tag, step and pixels, 0 to 1, of the images."""
    for event in read_events(folder):
        for value in event.summary.value:
            if value.HasField("image"):
                pixels = matplotlib.image.imread(BytesIO(value.image.encoded_image_string), format="png")
                yield value.tag, event.step, pixels


def _masked(data: bytes) -> int:
    """TFRecord's checksum: rotated, and moved on."""
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
