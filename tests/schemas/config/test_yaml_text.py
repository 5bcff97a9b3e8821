"""YAML's plain data is read, by the rules of YAML 1.2; all else is one error, soon and in little memory."""

import math
import random
import time
from contextlib import suppress

import pytest
import yaml

from distillcache.schemas.config.yaml_text import YamlError, parse_yaml, to_yaml

LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("010", 10),
        ("0o17", 15),
        ("0xff", 255),
        ("1e3", 1000.0),
        ("-.inf", -math.inf),
        ("1:30", "1:30"),
        ("2025-01-31", "2025-01-31"),
        ("yes", "yes"),
        ("1_0e", "1_0e"),
        ("=", "="),
        ("~", None),
        ("", None),
        ("\ufeffa: 1", {"a": 1}),
        ("x: &x {a: 1, b: 2}\ny: {<<: *x, b: 3}", {"x": {"a": 1, "b": 2}, "y": {"a": 1, "b": 3}}),
        ("a: !!str 3", {"a": "3"}),
    ],
)
def test_plain_data_is_read(text: str, value: object) -> None:
    assert parse_yaml(text) == value


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("!!timestamp x", "the tag !!timestamp is not known"),
        ("!!binary a", "the tag !!binary is not known"),
        ("!!int x", "'x' is no !!int"),
        ("!!float [1]", "'a sequence' is no !!float"),
        ("!!map [1]", "!!map before something else"),
        ("9" * 5000, "a number of 5,000 digits"),
        ("a: 1\nb: {c: 1, c: 2}", "the key c is given twice (line 2, column 11)"),
        ("{1: 2}", "the key 1 is no text"),
        ("{null: 2}", "the key null is no text"),
        ("? [a]\n: 1", "the key a sequence is no text"),
        ("&a [*a]", "an alias refers to itself"),
        (LAUGHS, "100,000 values"),
        ("a: 1\n---\nb: 2", "a second document begins (line 2, column 1)"),
        ('"\\ud800"', "half a surrogate pair"),
        ('"a\\0b"', "NUL"),
        ("a\0b", "unacceptable character"),
        ("\ta: b", "cannot start any token"),
        ("<<: 3", "expected a mapping"),
        ("[<<]", "!!merge"),
        ("[" * 3000, "64 brackets"),
        ("- " * 3000, "64 levels"),
        ("{a: " * 3000, "64 brackets"),
    ],
)
def test_what_is_refused_is_named_at_once(text: str, told: str) -> None:
    began = time.perf_counter()
    with pytest.raises(YamlError) as caught:
        parse_yaml(text)
    assert told in str(caught.value)
    assert time.perf_counter() - began < 2  # 3,000 brackets took ten seconds


@pytest.mark.parametrize(
    "text", ["007", "1e3", "yes", "null", "~", "!", "#", "2025-01-31", "1:30", "0o7", " a", "", "<<"]
)
def test_a_dumped_text_is_that_text_again_here_and_to_yaml_1_1(text: str) -> None:
    dumped = to_yaml({"a": text})
    assert parse_yaml(dumped) == {"a": text} == yaml.safe_load(dumped)


def test_random_bytes_of_yaml_give_a_value_or_the_one_error() -> None:
    random.seed(3)
    letters = [*"{}[]:,-?!&*#|>'\"%@`~<>= \n\t0123456789.eEabxy_+", "!!int ", "<<: ", "---\n", "\\u", "é"]
    for _ in range(3000):
        text = "".join(random.choices(letters, k=random.randrange(1, 24)))
        with suppress(YamlError):
            parse_yaml(text)
