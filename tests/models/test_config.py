"""The plan of a decoder's layers: the cheapest one, found by trying all, and the shapes that models have."""

from itertools import pairwise, product

import pytest

from distillcache.models.config import BlockKind, LayerGroup, ModelConfig, plan_layers

A, B, C = BlockKind(), BlockKind(moe=True), BlockKind(window=4)


def kinds_of(layers: tuple[LayerGroup, ...]) -> tuple[BlockKind, ...]:
    return tuple(kind for group in layers for kind in group.pattern * group.repeats)


def cost_of(layers: tuple[LayerGroup, ...]) -> tuple[int, int]:
    """Blocks traced, and groups."""
    return sum(len(group.pattern) for group in layers), len(layers)


def period(kinds: tuple[BlockKind, ...]) -> int:
    """The length of the shortest pattern whose repeats are these blocks."""
    return next(n for n in range(1, len(kinds) + 1) if len(kinds) % n == 0 and kinds == kinds[:n] * (len(kinds) // n))


def cheapest(kinds: tuple[BlockKind, ...]) -> tuple[int, int]:
    """The least cost over all `2 ** (n - 1)` ways to cut the blocks into runs, each run a group."""
    found = []
    for cuts in product([False, True], repeat=len(kinds) - 1):
        at = [0, *(place for place, cut in enumerate(cuts, 1) if cut), len(kinds)]
        runs = [kinds[start:stop] for start, stop in pairwise(at)]
        found.append((sum(map(period, runs)), len(runs)))
    return min(found)


@pytest.mark.parametrize(
    ("alphabet", "longest"), [((A, B), 8), ((A, B, C), 5)], ids=["two kinds to 8", "three kinds to 5"]
)
def test_the_plan_is_the_cheapest_and_keeps_the_order(alphabet: tuple[BlockKind, ...], longest: int):
    for length in range(1, longest + 1):
        for kinds in product(alphabet, repeat=length):
            layers = plan_layers(kinds)
            assert kinds_of(layers) == kinds
            assert cost_of(layers) == cheapest(kinds)


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ([A] * 64, [((A,), 64)]),
        ([A] * 3 + [B] * 58, [((A,), 3), ((B,), 58)]),  # DeepSeek-V3: dense first
        ([A, B] * 24, [((A, B), 24)]),  # Qwen3-MoE with decoder_sparse_step 2
        ([C, C, C, A] * 12, [((C, C, C, A), 12)]),  # Llama 4: every fourth block sees all
        ([A] + [C, C, C, B] * 9, [((A,), 1), ((C, C, C, B), 9)]),
        # A last repeat that is cut short: the pattern would begin anew, so what is left is a group of its own.
        ([C, C, C, A] * 5 + [C, C], [((C, C, C, A), 5), ((C,), 2)]),
        ([A], [((A,), 1)]),
        ([], []),
    ],
    ids=["alike", "dense first", "every other", "every fourth", "dense first, every fourth", "rest", "one", "none"],
)
def test_plans_of_models(kinds: list[BlockKind], expected: list[tuple[tuple[BlockKind, ...], int]]):
    assert plan_layers(kinds) == tuple(LayerGroup(pattern, repeats) for pattern, repeats in expected)


def test_places_follow_the_plan():
    layers = plan_layers([C, A, B, A, B])
    config = ModelConfig(61, 36, 40, 6, 2, 8, layers)
    assert layers == (LayerGroup((C,), 1), LayerGroup((A, B), 2))
    assert list(config.places()) == [(0, 0, 0, 0), (1, 1, 0, 0), (2, 1, 0, 1), (3, 1, 1, 0), (4, 1, 1, 1)]
    assert (config.num_blocks, config.kinds, config.moe_blocks) == (5, (C, A, B, A, B), (2, 4))
    assert all(config.layers[g].pattern[place] == config.kinds[block] for block, g, _, place in config.places())


def test_a_config_without_experts_says_so():
    with pytest.raises(ValueError, match="no experts"):
        _ = ModelConfig(61, 36, 40, 6, 2, 8, plan_layers([A])).moe_config
