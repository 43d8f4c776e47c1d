"""Weight maps as data: each rule runs in both directions; a map that does not fit its model is refused with a list."""

from __future__ import annotations

from itertools import chain
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from megacore import ModelConfig, ModelFamily, hookimpl
from megacore.checkpoint.matrix import LazyMatrix, StoredMatrix
from megacore.errors import PluginError, WeightMapError
from megacore.model import GatedMLP, RMSNorm, SelfAttention
from megacore.plugins import Family, PluginRegistry
from megacore.weights import Copy, FusedQKV, Stacked, WeightMap, grouped_qkv_rows
from megacore.weights.binding import bind
from megacore.weights.rules import QKVOrder

HEADS = {"multi-head": (4, 4, 6), "3 groups of 2": (6, 3, 2), "2 groups of 5": (10, 2, 4), "multi-query": (7, 1, 8)}
"""Query heads, key-value heads and their size, by what they are called."""


def config_with(num_attention_heads: int = 6, num_kv_heads: int = 3, head_dim: int = 2, **changes) -> ModelConfig:
    sizes = {
        "num_layers": 2, "hidden_size": 5, "ffn_hidden_size": 7, "vocab_size": 11, "max_position_embeddings": 16,
        "norm_eps": 1e-5, "num_attention_heads": num_attention_heads, "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
    }  # fmt: skip
    return ModelConfig(family="tiny", **sizes | changes)


@pytest.fixture(params=HEADS)
def config(request) -> ModelConfig:
    return config_with(*HEADS[request.param])


def numbered(rows: int, columns: int, *, first: int = 0) -> Tensor:
    """A matrix without two equal elements."""
    return torch.arange(first, first + rows * columns).view(rows, columns)


def matrix(tensor: Tensor) -> StoredMatrix:
    return StoredMatrix(*tensor.shape, tensor.dtype, lambda: tensor)


def read(lazy: LazyMatrix) -> Tensor:
    whole = lazy.read(slice(0, lazy.rows), slice(0, lazy.columns))
    assert whole.shape == (lazy.rows, lazy.columns)
    return whole


def order_of(config: ModelConfig, permutation=None) -> QKVOrder:
    return QKVOrder.from_permutation(config, grouped_qkv_rows(config) if permutation is None else permutation)


def shuffled_order(config: ModelConfig) -> QKVOrder:
    """An order that no simpler one would pass for: neither grouped nor its own inverse."""
    rows = (config.num_attention_heads + 2 * config.num_kv_heads) * config.head_dim
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(3))
    assert not torch.equal(order, order.argsort())
    return order_of(config, order.tolist())


def qkv_parts(config: ModelConfig, columns: int) -> list[Tensor]:
    """Distinguishable query, key and value rows."""
    rows = [heads * config.head_dim for heads in (config.num_attention_heads, config.num_kv_heads, config.num_kv_heads)]
    return list(numbered(sum(rows), columns).split(rows))


class Shifted(Copy):
    """A rule of a plugin's own, with an attribute of its own."""

    def __init__(self, native: str, source: str, *, shift: int) -> None:
        super().__init__(native, source)
        self.shift = shift


def test_a_rule_for_a_layer_keeps_what_a_plugins_own_kind_of_rule_holds():
    rule = Shifted("layers.*.a", "blocks.*.b", shift=3)

    [first, second] = WeightMap(rule).expand(2)

    assert isinstance(second, Shifted)
    assert (second.native, second.sources, second.shift) == ("layers.1.a", ("blocks.1.b",), 3)
    assert (first.native, rule.native) == ("layers.0.a", "layers.*.a")


# The order of the fused QKV projection


def test_grouped_rows_are_of_each_group_its_queries_its_key_and_its_value(config):
    query, key, value = (part.unflatten(0, (-1, config.head_dim)) for part in qkv_parts(config, columns=1))
    queries_per_group = config.num_attention_heads // config.num_kv_heads
    expected = torch.cat(
        [
            torch.cat([*query[group * queries_per_group : (group + 1) * queries_per_group], key[group], value[group]])
            for group in range(config.num_kv_heads)
        ]
    )

    rows = grouped_qkv_rows(config)

    assert torch.equal(torch.cat(qkv_parts(config, columns=1))[rows], expected)


@pytest.mark.parametrize(
    "permutation",
    [
        [],
        range(23),
        range(25),
        [*range(23), 24],
        [*range(23), 22],
        [*range(23), -1],
    ],
    ids=["empty", "a row too few", "a row too many", "a row that there is not", "a row twice", "a negative row"],
)
def test_an_order_that_is_no_permutation_of_the_rows_is_refused(permutation):
    config = config_with(num_attention_heads=6, num_kv_heads=3, head_dim=2)

    with pytest.raises(PluginError) as caught:
        QKVOrder.from_permutation(config, permutation)

    assert str(caught.value) == (
        f"the plugin for tiny returned a qkv_permutation of {len(permutation)} entries that is not a permutation of "
        "the 24 rows of the QKV projection"
    )


# Rules


def test_copy_is_the_source_in_both_directions(config):
    source = numbered(5, 3)
    rule = Copy("native", "source")

    native = rule.to_native([matrix(source)], order_of(config))
    [back] = rule.to_source(native, order_of(config))

    assert torch.equal(read(native), source)
    assert torch.equal(read(back), source)


def test_stacked_lays_the_parts_below_one_another_in_the_order_they_are_given(config):
    gate, up, third = (numbered(5, 3, first=100 * part) for part in range(3))
    rule = Stacked("native", gate="g", up="u", third="t")

    native = rule.to_native([matrix(gate), matrix(up), matrix(third)], order_of(config))
    back = rule.to_source(native, order_of(config))

    assert rule.sources == ("g", "u", "t")
    assert torch.equal(read(native), torch.cat([gate, up, third]))
    assert [read(part).tolist() for part in back] == [gate.tolist(), up.tolist(), third.tolist()]


@pytest.mark.parametrize("columns", [1, 5], ids=["biases", "weights"])
@pytest.mark.parametrize("make_order", [order_of, shuffled_order], ids=["grouped", "shuffled"])
def test_fused_qkv_takes_separate_parts_in_the_order_of_the_permutation_and_gives_them_back(
    config, columns, make_order
):
    parts = qkv_parts(config, columns)
    order = make_order(config)
    rule = FusedQKV("native", q="q", k="k", v="v")

    native = rule.to_native([matrix(part) for part in parts], order)
    back = rule.to_source(native, order)

    assert torch.equal(read(native), torch.cat(parts)[order.native_from_source])
    assert [read(part).tolist() for part in back] == [part.tolist() for part in parts]


@pytest.mark.parametrize("make_order", [order_of, shuffled_order], ids=["grouped", "shuffled"])
def test_fused_qkv_takes_one_tensor_in_the_order_of_the_permutation_and_gives_it_back(config, make_order):
    source = torch.cat(qkv_parts(config, columns=5))
    order = make_order(config)
    rule = FusedQKV("native", qkv="qkv")

    native = rule.to_native([matrix(source)], order)
    [back] = rule.to_source(native, order)

    assert torch.equal(read(native), source[order.native_from_source])
    assert torch.equal(read(back), source)


def test_fused_qkv_names_its_sources_in_the_order_of_the_permutation_whatever_the_order_of_the_call():
    assert FusedQKV("native", v="v", k="k", q="q").sources == ("q", "k", "v")


@pytest.mark.parametrize("names", [{}, {"q": "q", "k": "k"}, {"q": "q", "k": "k", "v": "v", "qkv": "qkv"}])
def test_fused_qkv_without_exactly_its_sources_is_refused(names):
    with pytest.raises(PluginError, match=r"FusedQKV\('native'\) takes either q, k and v or qkv"):
        FusedQKV("native", **names)


@pytest.mark.parametrize(
    "rule, parts",
    [
        (Copy("n", "s"), [numbered(24, 5)]),
        (Stacked("n", a="a", b="b"), [numbered(12, 5), numbered(12, 5, first=100)]),
        (FusedQKV("n", q="q", k="k", v="v"), list(numbered(24, 5).split([12, 6, 6]))),
        (FusedQKV("n", qkv="qkv"), [numbered(24, 5)]),
    ],
    ids=repr,
)
def test_any_block_may_be_read_by_itself(rule, parts):
    config = config_with(num_attention_heads=6, num_kv_heads=3, head_dim=2)
    native = rule.to_native([matrix(part) for part in parts], order_of(config))
    whole = read(native)

    for rows in (slice(0, 1), slice(11, 14), slice(23, 24), torch.tensor([20, 3, 3, 12])):
        assert torch.equal(native.read(rows, slice(1, 4)), whole[rows, 1:4])
    for source in rule.to_source(native, order_of(config)):
        assert torch.equal(source.read(slice(2, 5), slice(1, 4)), read(source)[2:5, 1:4])


# Maps


def test_a_map_repeats_the_rules_of_a_layer_for_every_layer():
    weight_map = WeightMap(
        Copy("embedding.weight", "embed"),
        FusedQKV("layers.*.qkv", q="h.*.q", k="h.*.k", v="h.*.v"),
        Stacked("layers.*.fc1", gate="h.*.gate", up="h.*.up"),
    )

    rules = weight_map.expand(2)

    assert {rule.native: (type(rule), rule.sources) for rule in rules} == {
        "embedding.weight": (Copy, ("embed",)),
        "layers.0.qkv": (FusedQKV, ("h.0.q", "h.0.k", "h.0.v")),
        "layers.0.fc1": (Stacked, ("h.0.gate", "h.0.up")),
        "layers.1.qkv": (FusedQKV, ("h.1.q", "h.1.k", "h.1.v")),
        "layers.1.fc1": (Stacked, ("h.1.gate", "h.1.up")),
    }
    assert len(rules) == 5


class TinyLayer(nn.Module):
    def __init__(self, config, parallel):
        super().__init__()
        self.input_layernorm = RMSNorm(config, parallel)
        self.self_attention = SelfAttention(config, parallel)
        self.mlp = GatedMLP(config, parallel)


ONCE = (
    Copy("embedding.word_embeddings.weight", "embed"),
    Copy("decoder.final_layernorm.weight", "norm"),
    Copy("output_layer.weight", "head"),
)
NORM = Copy("decoder.layers.*.input_layernorm.weight", "h.*.norm")
QKV = FusedQKV("decoder.layers.*.self_attention.linear_qkv.weight", q="h.*.q", k="h.*.k", v="h.*.v")
PROJECTION = Copy("decoder.layers.*.self_attention.linear_proj.weight", "h.*.o")
FC1 = Stacked("decoder.layers.*.mlp.linear_fc1.weight", gate="h.*.gate", up="h.*.up")
FC2 = Copy("decoder.layers.*.mlp.linear_fc2.weight", "h.*.down")


def family_with(*rules, permutation=grouped_qkv_rows, **options) -> Family:
    """A family, ``tiny``, of a plugin in memory that has these rules."""
    plugin = ModuleType("megacore_tiny")

    @hookimpl
    def model_families():
        return [ModelFamily(name="tiny", architectures=(), config_from_source=dict, config_to_source=dict)]

    @hookimpl
    def weight_map(config):
        return WeightMap(*rules, **options)

    @hookimpl
    def qkv_permutation(config):
        return permutation(config)

    @hookimpl
    def load_reference(config):
        raise NotImplementedError

    @hookimpl
    def build_layer(config, parallel):
        return TinyLayer(config, parallel)

    for hook in (model_families, weight_map, qkv_permutation, load_reference, build_layer):
        setattr(plugin, hook.__name__, hook)
    registry = PluginRegistry()
    registry.register(plugin, distribution="megacore-tiny", version="1.0")
    return registry.get_family("tiny")


def refusal_of(*rules) -> list[str]:
    """The lines of the error that such a map ends in."""
    with pytest.raises(WeightMapError) as caught:
        bind(family_with(*rules), config_with(), "hf")
    heading, *lines = str(caught.value).splitlines()
    assert heading == "the weight map of megacore-tiny 1.0 for tiny (hf) does not fit its layers:"
    return lines


def test_a_map_that_covers_the_model_is_bound_in_the_order_of_its_parameters():
    bound = bind(family_with(FC2, FC1, PROJECTION, QKV, NORM, *reversed(ONCE)), config_with(), "hf")

    per_layer = (
        "input_layernorm.weight", "self_attention.linear_qkv.weight", "self_attention.linear_proj.weight",
        "mlp.linear_fc1.weight", "mlp.linear_fc2.weight",
    )  # fmt: skip
    assert list(bound.rules) == [
        "embedding.word_embeddings.weight",
        *(f"decoder.layers.{layer}.{name}" for layer in (0, 1) for name in per_layer),
        "decoder.final_layernorm.weight",
        "output_layer.weight",
    ]


def test_a_bound_map_knows_the_shape_of_every_source_tensor():
    bound = bind(family_with(*ONCE, NORM, QKV, PROJECTION, FC1, FC2), config_with(), "hf")

    # hidden 5, ffn 7, vocabulary 11; 6 query and 3 key-value heads of 2
    layer = {"norm": (5,), "q": (12, 5), "k": (6, 5), "v": (6, 5), "o": (5, 12), "gate": (7, 5), "up": (7, 5),
             "down": (5, 7)}  # fmt: skip
    assert bound.source_shapes() == dict(
        chain(
            {"embed": (11, 5), "norm": (5,), "head": (11, 5)}.items(),
            ((f"h.{number}.{name}", shape) for number in (0, 1) for name, shape in layer.items()),
        )
    )


def test_parameters_that_no_rule_produces_are_listed():
    assert refusal_of(*ONCE[1:], NORM, QKV, PROJECTION, FC1) == [
        "  not produced by any rule: embedding.word_embeddings.weight, decoder.layers.0.mlp.linear_fc2.weight, "
        "decoder.layers.1.mlp.linear_fc2.weight"
    ]


def test_what_is_produced_and_is_no_parameter_is_listed():
    extra = Copy("decoder.layers.*.mlp.linear_fc3.weight", "h.*.third")

    assert refusal_of(*ONCE, NORM, QKV, PROJECTION, FC1, FC2, extra) == [
        "  produced, but not a parameter of the model: decoder.layers.0.mlp.linear_fc3.weight, "
        "decoder.layers.1.mlp.linear_fc3.weight"
    ]


def test_a_parameter_that_two_rules_produce_is_listed():
    again = Copy("decoder.layers.1.input_layernorm.weight", "elsewhere")

    assert refusal_of(*ONCE, NORM, QKV, PROJECTION, FC1, FC2, again) == [
        "  produced by several rules: decoder.layers.1.input_layernorm.weight"
    ]


def test_a_source_tensor_that_two_rules_use_is_listed():
    tied_by_mistake = Copy("output_layer.weight", "embed")

    assert refusal_of(*ONCE[:2], tied_by_mistake, NORM, QKV, PROJECTION, FC1, FC2) == [
        "  source tensors used by several rules: embed"
    ]


def test_a_source_tensor_that_one_rule_uses_twice_is_listed():
    twice = Stacked(FC1.native, gate="h.*.gate", up="h.*.gate")

    assert refusal_of(*ONCE, NORM, QKV, PROJECTION, twice, FC2) == [
        "  source tensors used by several rules: h.0.gate, h.1.gate"
    ]


def test_a_rule_for_one_layer_that_forgets_the_star_is_found():
    forgotten = Copy("decoder.layers.0.mlp.linear_fc2.weight", "h.0.down")

    assert refusal_of(*ONCE, NORM, QKV, PROJECTION, FC1, forgotten) == [
        "  not produced by any rule: decoder.layers.1.mlp.linear_fc2.weight"
    ]


def test_all_that_is_wrong_with_a_map_is_said_at_once():
    lines = refusal_of(*ONCE[1:], Copy("nothing", "norm"), NORM, NORM, QKV, PROJECTION, FC1, FC2)

    assert [line.split(":")[0].strip() for line in lines] == [
        "not produced by any rule",
        "produced, but not a parameter of the model",
        "produced by several rules",
        "source tensors used by several rules",
    ]


def test_a_map_is_not_bound_with_an_order_that_is_no_permutation():
    family = family_with(*ONCE, NORM, QKV, PROJECTION, FC1, FC2, permutation=lambda config: [0] * 24)

    with pytest.raises(PluginError, match="not a permutation of the 24 rows"):
        bind(family, config_with(), "hf")


# A map and the tensors of a checkpoint


def test_ignored_tensors_are_named_by_a_pattern():
    rules = (*ONCE, NORM, QKV, PROJECTION, FC1, FC2)
    bound = bind(family_with(*rules, ignored=["h.*.table"]), config_with(), "hf")
    found = bound.source_shapes()

    bound.check_sources(found | {"h.0.table": (3,), "h.1.table": (3,)}, "there")

    with pytest.raises(WeightMapError, match=r"unknown to the weight map: h\.0\.table\.weight$"):
        bound.check_sources(found | {"h.0.table.weight": (3,)}, "there")


def test_a_tensor_that_may_repeat_another_is_known_and_not_needed():
    rules = (*ONCE, NORM, QKV, PROJECTION, FC1, FC2)
    bound = bind(family_with(*rules, aliases={"copy of the head": "head"}), config_with(), "hf")

    bound.check_sources(bound.source_shapes(), "there")
    bound.check_sources(bound.source_shapes() | {"copy of the head": (11, 5)}, "there")


def test_tensors_that_are_missing_unknown_or_of_another_shape_are_listed_at_once():
    bound = bind(family_with(*ONCE, NORM, QKV, PROJECTION, FC1, FC2), config_with(), "hf")
    found = bound.source_shapes() | {"h.2.q": (12, 5), "h.1.o": (12, 5)}
    del found["head"], found["h.0.up"]

    with pytest.raises(WeightMapError) as caught:
        bound.check_sources(found, "there")

    assert str(caught.value).splitlines() == [
        "there does not hold the tensors of this model:",
        "  missing: h.0.up, head",
        "  unknown to the weight map: h.2.q",
        "  of another shape than the configuration says: h.1.o [12, 5] instead of [5, 12]",
    ]
