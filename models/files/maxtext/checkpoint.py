"""Parameter checkpoints of MaxText, as its trainer and its converters write them with Orbax.

MaxText keeps no config that says what the model is. So a *folder* has the model's HF files, config.json and the
tokenizer's, and the checkpoint in it or named by it:

    <folder>/config.json, tokenizer.json, ...   of the HF model with this architecture
    <folder>/maxtext.json                       {"checkpoint": "gs://bucket/run/checkpoints/1000/items"}

Without a maxtext.json the checkpoint is the folder itself, or its `items`.

Names and numbers: names.py.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

import numpy as np
from pydantic import Field, ValidationError

from distillcache.models.config import ModelConfig
from distillcache.models.files.hf import names_in
from distillcache.models.files.maxtext.names import EMBEDDING, HEAD, Conversion, name_alone, names_in_stack
from distillcache.models.files.maxtext.orbax import METADATA, OrbaxArray, OrbaxArrays, is_orbax
from distillcache.models.files.tensors import INDEX_NAME, WEIGHTS_NAME, Box, whole
from distillcache.schemas.base import Config
from distillcache.schemas.errors import CheckpointError
from distillcache.schemas.store.path import Location, locate

NOTES = "maxtext.json"
ITEMS = ("items", "default")  # what checkpoint managers call the tree within a step's folder
OPTIMIZER = "opt_state."
MOST_AXES, MOST_NUMBERS = 8, 2**42  # of one array; all of Kimi K2 has 2**40


class MaxtextNotes(Config):
    """maxtext.json: where the checkpoint is, and how its numbers differ from HF's where that is not as usual."""

    checkpoint: str | None = Field(default=None, description="the Orbax checkpoint; default: this folder, or its items")
    queries: Literal["auto", "scaled", "plain"] = Field(
        default="auto",
        description=("scaled: multiplied by 1/sqrt(head width); auto: MaxText's convention for this family"),
    )
    rotary: Literal["auto", "halves", "neighbours"] = Field(
        default="auto", description=("which dimensions of a head rotate together; auto: neighbours if RoPE is llama3's")
    )


@dataclass(frozen=True)
class MaxtextFolder:
    """A checkpoint of MaxText that a folder has or names."""

    folder: Location
    checkpoint: Location
    notes: MaxtextNotes


def find_maxtext(folder: Location) -> MaxtextFolder | None:
    """The checkpoint of a folder with HF's files; None where the folder has weights of HF's kind, or none.

    Raises:
        CheckpointError: what it names is not there.
    """
    names = names_in(folder)
    if WEIGHTS_NAME in names or INDEX_NAME in names:
        return None
    if NOTES in names:
        notes = _read_notes(folder / NOTES)
        named = folder if notes.checkpoint is None else locate(notes.checkpoint)
        return MaxtextFolder(folder, _checkpoint_in(named, folder), notes)
    if METADATA in names or any(name in names and is_orbax(folder / name) for name in ITEMS):
        return MaxtextFolder(folder, _checkpoint_in(folder, folder), MaxtextNotes())
    return None


def _read_notes(file: Location) -> MaxtextNotes:
    try:
        return MaxtextNotes.model_validate_json(file.read_bytes())
    except (ValidationError, OSError) as error:
        raise CheckpointError(
            f"{NOTES} cannot be used",
            {"file": file, "found": " ".join(str(error).split())[:300]},
            'write {"checkpoint": "PATH"}, PATH being the folder with _METADATA',
        ) from error


def _checkpoint_in(named: Location, folder: Location) -> Location:
    for place in (named, *(named / name for name in ITEMS)):
        if is_orbax(place):
            return place
    raise CheckpointError(
        "there is no Orbax checkpoint at the named path",
        {"folder": folder, "named": named, "expected": f"a folder with {METADATA}, or with {ITEMS[0]}/{METADATA}"},
        f"name MaxText's <run>/checkpoints/<step>/items in {NOTES}",
    )


@dataclass(frozen=True)
class _Held:
    """The part of a stack that is in memory: a box of it, for every index that will be needed."""

    key: tuple[str, str]
    first: int
    values: np.ndarray


class MaxtextSource:
    """A checkpoint's parameters under `maxtext_layout`'s names, block by block, with HF's numbers.

    Of a stacked array the part that is needed is read at once, for all blocks: each of its chunks has all of them.
    """

    def __init__(self, place: MaxtextFolder, config: ModelConfig) -> None:
        self.where = place.checkpoint
        self._convert = Conversion.of(config, place.notes.queries, place.notes.rotary)
        self._arrays = OrbaxArrays(place.checkpoint)
        self._opened = self._arrays.open(_parameter_names(self._arrays))
        self._places: dict[str, tuple[str, int | None]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        for name, array in self._opened.items():
            if len(array.shape) > MOST_AXES or prod(array.shape) > MOST_NUMBERS:
                raise CheckpointError(
                    "an array of an Orbax checkpoint has a shape that no model has",
                    {"checkpoint": self.where, "array": name, "found": list(array.shape)},
                    "copy the checkpoint again",
                )
            self._add(name, array, config)
        self._wanted: dict[tuple[str, str], list[int]] = {}  # of a stack's part, the places that will be asked for
        self._held: _Held | None = None

    def announce(self, reads: Sequence[tuple[str, Box]]) -> None:
        """See `TensorSource`."""
        for array, number, inside in (self._asked(*read) for read in reads):
            if number is not None:
                self._wanted.setdefault((array, str(inside)), []).append(number)

    def read(self, name: str, box: Box | None = None) -> np.ndarray:
        """A block's parameter, or a part of it."""
        box = whole(self.shapes[name]) if box is None else box
        array, number, inside = self._asked(name, box)
        if number is None:
            stored = self._arrays.read(array, self._opened[array], inside)
        else:
            stored = self._of_stack(array, number, inside)
        found = self._convert.to_hf(array, stored)
        return found if inside == box else found.reshape(self.shapes[name])[box]

    def _asked(self, name: str, box: Box) -> tuple[str, int | None, Box]:
        """The array, the place in its stack, and what is read there: of a bias, which is small, all."""
        array, number = self._places[name]
        shape = self._opened[array].shape
        inner = shape if number is None else (shape[0], *shape[2:])
        return array, number, box if len(inner) == len(box) else whole(inner)

    def close(self) -> None:
        """Release what is held."""
        self._held = None

    def parts(self) -> Iterator[tuple[str, str, tuple[int, ...], Iterator[np.ndarray]]]:
        """All parameters that are stored, for a digest: name, dtype, shape and slabs of values, by name."""
        for name in sorted(self._opened):
            array = self._opened[name]
            yield name, array.dtype, array.shape, self._arrays.slabs(name, array)

    def _add(self, name: str, array: OrbaxArray, config: ModelConfig) -> None:
        stacked = names_in_stack(name, array.shape, config)
        inner = _without_padding(name, array.shape, config) if stacked is None else (array.shape[0], *array.shape[2:])
        shape = (prod(inner),) if name.endswith(".bias") else inner
        for number, own in enumerate([name_alone(name, config)] if stacked is None else stacked):
            self._places[own] = (name, None if stacked is None else number)
            self.shapes[own], self.dtypes[own] = shape, array.dtype

    def _of_stack(self, array: str, number: int, box: Box) -> np.ndarray:
        key = (array, str(box))
        if self._held is None or self._held.key != key:
            self._held = None  # first: two stacks at once are not meant
            wanted = self._wanted.get(key) or [number]
            run = slice(min(wanted), max(wanted) + 1)
            values = self._arrays.read(array, self._opened[array], (*box[:1], run, *box[1:]))
            self._held = _Held(key, run.start, values)
        found = self._held.values[:, number - self._held.first]
        coming = self._wanted.get(key, [number])
        if number in coming:
            coming.remove(number)
        if not coming:
            self._held = None
        return found


def _parameter_names(arrays: OrbaxArrays) -> dict[str, str]:
    """The parameters below the root of MaxText's tree -> their whole names. Moments of the optimizer are none."""
    roots = [
        name.removesuffix(EMBEDDING)
        for name in arrays.names
        if name.endswith(EMBEDDING) and not name.startswith(OPTIMIZER)
    ]
    if not roots:
        raise CheckpointError(
            "this Orbax checkpoint is not one of MaxText's",
            {"checkpoint": arrays.place, "missing": EMBEDDING, "found": ", ".join(arrays.names[:4]) or "no arrays"},
            "name a checkpoint that MaxText wrote with scan_layers, or without",
        )
    root = min(roots, key=len)
    below = [name for name in arrays.names if name.startswith(root) and not name.startswith(OPTIMIZER)]
    return {name.removeprefix(root): name for name in below if "." in name}  # `step` has no dot


def _without_padding(name: str, shape: tuple[int, ...], config: ModelConfig) -> tuple[int, ...]:
    """MaxText may pad the vocabulary: what lies behind the config's is not asked for."""
    axis = {EMBEDDING: 0, HEAD: 1}.get(name)
    if axis is None or len(shape) != 2 or shape[axis] < config.vocab_size:
        return shape
    return tuple(config.vocab_size if at == axis else size for at, size in enumerate(shape))
