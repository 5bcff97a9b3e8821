"""The peers' formats: what is written is what is read, in the order that was asked for."""

import json
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

from distillcache.cache_builder.text.files.tf_example import decode_example
from distillcache.tools.bench.peer_formats import RawShards, SampleFiles, TfExamples, encode_example

SHAPE = (3, 4, 8)
ORDER = [4, 0, 6, 4]


@pytest.fixture(scope="module")
def rows():
    values = np.random.default_rng(0).normal(size=(7, *SHAPE)).astype(ml_dtypes.bfloat16)
    return list(values.view(np.uint16))


def readers(folder, rows):
    RawShards.write(folder / "raw", rows, 3)
    SampleFiles.write(folder / "samples", rows)
    TfExamples.write(folder / "examples.array_record", rows)
    return [
        RawShards(folder / "raw", SHAPE),
        SampleFiles(folder / "samples", SHAPE),
        TfExamples(folder / "examples.array_record", SHAPE),
    ]


@pytest.mark.parametrize("kind", [0, 1, 2], ids=["raw shards", "sample files", "tf.Example"])
def test_a_peer_gives_back_the_rows(tmp_path, rows, kind):
    batch = readers(tmp_path, rows)[kind][ORDER]
    np.testing.assert_array_equal(batch, np.stack([rows[number] for number in ORDER], axis=1))
    assert batch.flags.writeable  # memory of its own, not a view of the file


def test_an_example_is_what_protocol_buffers_read():
    """Against the reference implementation, with the message types of tensorflow/core/example built by hand."""
    protobuf = pytest.importorskip("google.protobuf")
    values = np.arange(300, dtype=np.float32)
    script = """
import json, sys
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
file = descriptor_pb2.FileDescriptorProto(name="example.proto", package="t", syntax="proto3")
def message(name, *fields):
    new = file.message_type.add(name=name)
    for number, (field, kind, label, type_name) in fields:
        new.field.add(name=field, number=number, type=kind, label=label, type_name=type_name)
    return new
message("FloatList", (1, ("value", 2, 3, None)))
message("Feature", (2, ("float_list", 11, 1, ".t.FloatList")))
features = message("Features", (1, ("feature", 11, 3, ".t.Features.FeatureEntry")))
entry = features.nested_type.add(name="FeatureEntry")
entry.options.map_entry = True
entry.field.add(name="key", number=1, type=9, label=1)
entry.field.add(name="value", number=2, type=11, label=1, type_name=".t.Feature")
message("Example", (1, ("features", 11, 1, ".t.Features")))
pool = descriptor_pool.DescriptorPool()
pool.Add(file)
example = message_factory.GetMessageClass(pool.FindMessageTypeByName("t.Example"))()
example.ParseFromString(sys.stdin.buffer.read())
print(json.dumps({name: list(feature.float_list.value) for name, feature in example.features.feature.items()}))
"""
    assert protobuf is not None
    done = subprocess.run(
        [sys.executable, "-c", script], input=encode_example("x", values), capture_output=True, check=True
    )
    assert json.loads(done.stdout) == {"x": values.tolist()}


def test_other_features_are_passed_over():
    record = encode_example("first", np.ones(2)) + encode_example("second", np.arange(3.0))
    np.testing.assert_array_equal(decode_example(record)["second"], [0, 1, 2])
