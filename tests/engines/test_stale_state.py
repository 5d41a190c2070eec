"""Whatever could hold weights of another λ is found before a score is recorded, and named."""

from __future__ import annotations

import pathlib
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import pa_fast
from pa_fast import Generation, Item, Score
from pa_fast.base import Engine
from pa_fast.engines import model as engines_model
from pa_fast.engines.model import Inventory, tensors_and_modules
from pa_fast.engines.prefix import cache_argument
from pa_fast.errors import EngineError
from tests.engines.architectures import ARCHITECTURES, write_pair
from tests.engines.test_prefix import LONGROPE, make_model
from tests.sweep.test_growth import calls

PAIRS = [([5, 6, 7, 8], [9]), ([5, 6, 7, 8], [10, 11]), ([12], [13])]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def lm(tmp_path: pathlib.Path) -> pa_fast.LambdaModel:
    return pa_fast.load(*write_pair(tmp_path / "pair", "llama"))


class Scorer:
    """Mean log-likelihood of `PAIRS`, after `act` on the model at λ = 0.5."""

    higher_is_better = True

    def __init__(self, name: str, act: Callable[[Any], None] | None = None):
        self.name, self.act = name, act

    def __call__(self, engine: Engine) -> Score:
        values = [answer.logprob for answer in engine.loglikelihood(PAIRS)]
        if self.act is not None and engine.weights.lam == 0.5:
            self.act(engine.model)  # type: ignore[attr-defined]
        return Score(
            sum(values) / 3, "nats", 3, [Item(str(n), "", value) for n, value in enumerate(values)]
        )


def sweep(
    lm: pa_fast.LambdaModel, act: Callable[[Any], None] | None, out: pathlib.Path
) -> pa_fast.SweepResult:
    """λ = 0, 0.5, 1: `acts` does what it does at 0.5, after its score; `after` runs behind it."""
    return pa_fast.sweep(lm, "0,0.5,1", [Scorer("acts", act), Scorer("after")], out, figure=False)


def filled_cache(model: Any) -> Any:
    with torch.no_grad():
        return model(torch.tensor([[5, 6, 7]]), use_cache=True)[str(cache_argument(model))]


def _replaced(model: Any) -> None:
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone(), requires_grad=False)


def _moved(model: Any) -> None:
    model.model.norm.weight.data = model.model.norm.weight.clone()


def _swapped(model: Any) -> None:
    attention = model.model.layers[0].self_attn
    attention.k_proj.weight, attention.v_proj.weight = (
        attention.v_proj.weight,
        attention.k_proj.weight,
    )


def _removed(model: Any) -> None:
    model.model.layers = model.model.layers[:1]


def _cache(model: Any) -> None:
    model.model.kept = filled_cache(model)


def _cache_in_a_list(model: Any) -> None:
    model.model.layers[1].memory = [None, filled_cache(model)]


def _copy(model: Any) -> None:
    model.model.layers[0].mlp.transposed = model.model.layers[0].mlp.up_proj.weight.t().contiguous()


def _copy_in_a_dict(model: Any) -> None:
    model.model.layers[0].mlp.packed = {"up": model.model.layers[0].mlp.up_proj.weight.float()}


def _copy_in_a_tuple(model: Any) -> None:
    model.scales = (1.0, model.lm_head.weight.abs().amax(1))


def _copy_in_a_hidden_module(model: Any) -> None:
    model.model.layers[0].spare = [torch.nn.Linear(2, 2)]


def _buffer(model: Any) -> None:
    model.model.norm.register_buffer("copy_of_weight", model.model.norm.weight.clone())


def _module(model: Any) -> None:
    model.model.adapter = torch.nn.Linear(2, 2)


def _parametrized(model: Any) -> None:
    torch.nn.utils.parametrizations.weight_norm(model.model.layers[0].mlp.up_proj)


def _copy_in_a_deque(model: Any) -> None:
    model.model.layers[0].recent = deque([model.lm_head.weight.clone()])


def _rotary_table(model: Any) -> None:
    for buffer in model.buffers():
        buffer.mul_(0.5)


def _hook(model: Any) -> None:
    old = model.lm_head.weight.clone()
    model.lm_head.register_forward_hook(lambda module, inputs, output: inputs[0] @ old.T)


def _patched(model: Any) -> None:
    old = model.lm_head.weight.clone()
    model.lm_head.forward = lambda hidden: hidden @ old.T


def _training(model: Any) -> None:
    model.train()


def _scaling(model: Any) -> None:
    model.model.layers[1].self_attn.scaling *= 3


def _configuration(model: Any) -> None:
    model.config.num_hidden_layers = 1


@pytest.mark.parametrize(
    ("act", "culprit"),
    [
        (_copy_in_a_deque, "`model.layers.0.recent[0]` was added"),
        (_rotary_table, "inv_freq` was written to"),
        (_hook, "`lm_head._forward_hooks` was changed"),
        (_patched, "`lm_head.forward` was changed"),
        (_training, "training` was changed since the pair was loaded: it was False, and is True"),
        (_scaling, "`model.layers.1.self_attn.scaling` was changed"),
        (
            _configuration,
            "`config.num_hidden_layers` was changed since the pair was loaded: it was 2, and is 1",
        ),
        (_replaced, "`lm_head.weight` was replaced or moved"),
        (_moved, "`model.norm.weight`"),
        (_swapped, "`model.layers.0.self_attn.k_proj.weight` was replaced"),
        (_removed, "`model.layers.1.self_attn.q_proj.weight` is gone"),
        (_cache, "`model.kept` was added since the pair was loaded: a DynamicCache"),
        (
            _cache_in_a_list,
            "`model.layers.1.memory[1]` was added since the pair was loaded: a DynamicCache",
        ),
        (_copy, "`model.layers.0.mlp.transposed` was added since the pair was loaded: a Tensor"),
        (_copy_in_a_dict, "`model.layers.0.mlp.packed['up']` was added"),
        (_copy_in_a_tuple, "`scales[1]` was added"),
        (
            _copy_in_a_hidden_module,
            "`model.layers.0.spare[0]` was added since the pair was loaded: a Linear",
        ),
        (_buffer, "`model.norm.copy_of_weight` was added"),
        (_module, "`model.adapter.weight` was added"),
        (_parametrized, "`model.layers.0.mlp.up_proj"),
    ],
)
def test_what_an_evaluator_leaves_on_the_model_costs_every_later_score(
    act: Callable[[Any], None], culprit: str, lm: pa_fast.LambdaModel, tmp_path: pathlib.Path
) -> None:
    result = sweep(lm, act, tmp_path / "run")
    assert [(row.lam.key, row.evaluator) for row in result.rows] == [("0", "acts"), ("0", "after")]
    assert [(failure.lam.key, failure.evaluator) for failure in result.failures] == [
        ("0.5", "acts"),
        ("0.5", "after"),
        ("1", "acts"),
        ("1", "after"),
    ]
    assert all(culprit in failure.error for failure in result.failures), result.failures[0].error
    assert "evaluator `acts` changed the model" in result.failures[0].error


def test_a_static_cache_of_transformers_is_dropped(
    lm: pa_fast.LambdaModel, tmp_path: pathlib.Path
) -> None:
    from transformers import StaticCache

    def leave(model: Any) -> None:
        model._cache = StaticCache(config=model.config, max_cache_len=8)
        model(torch.tensor([[5, 6, 7]]), **{str(cache_argument(model)): model._cache})

    undisturbed = sweep(lm, None, tmp_path / "undisturbed")
    disturbed = sweep(lm, leave, tmp_path / "disturbed")
    assert not disturbed.failures and disturbed.rows == undisturbed.rows
    assert not hasattr(lm.model, "_cache")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_models_do_by_themselves_is_no_alarm(name: str, tmp_path: pathlib.Path) -> None:
    lm = pa_fast.load(*write_pair(tmp_path, name), batch_size=4)
    for lam in (0.5, 1.0):
        lm.set_lambda(lam)
        lm.loglikelihood(PAIRS)
        lm.generate([[5, 6], [7]], Generation(3))
        lm.model.generate(
            torch.tensor([[5, 6]]), max_new_tokens=3, do_sample=False, cache_implementation="static"
        )
        filled_cache(lm.model)
    lm.on_weights_changed()


def test_rotary_tables_go_back_to_what_they_were(tmp_path: pathlib.Path) -> None:
    lm = pa_fast.load(
        *write_pair(
            tmp_path, "phi-3", rope_parameters=LONGROPE, original_max_position_embeddings=32
        ),
        dtype="float32",
    )
    rotary = lm.model.model.rotary_emb
    before, held, known = rotary.inv_freq, rotary.inv_freq.clone(), set(vars(rotary))
    expected = lm.loglikelihood(PAIRS)
    lm.loglikelihood([([5] * 60, [6])])
    assert not torch.equal(rotary.inv_freq, held), "a long text must have swapped the table"
    lm.set_lambda(0.0)
    assert rotary.inv_freq is before and torch.equal(before, held) and set(vars(rotary)) == known
    assert lm.loglikelihood(PAIRS) == expected


def test_the_inventory_of_a_deep_model_names_what_was_added() -> None:
    model = make_model("llama", num_hidden_layers=22)
    inventory = Inventory.of(model)
    inventory.check(model)
    model.model.layers[21].mlp.left = torch.zeros(1)
    with pytest.raises(EngineError, match=r"model\.layers\.21\.mlp\.left` was added"):
        inventory.check(model)


def test_a_model_that_nobody_changed_is_not_searched(
    lm: pa_fast.LambdaModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two checks a λ: of 300 modules they would take longer than a GPU's switch."""
    searched: list[object] = []

    def search(model: torch.nn.Module) -> Iterator[tuple[str, object]]:
        searched.append(model)
        return tensors_and_modules(model)

    monkeypatch.setattr(engines_model, "tensors_and_modules", search)
    for lam in (0.0, 0.5, 1.0):
        lm.set_lambda(lam)
        lm.loglikelihood(PAIRS)
        lm.generate([[5, 6], [7]], Generation(4))
        lm.model.generate(torch.tensor([[5, 6]]), max_new_tokens=2)
        lm.on_weights_changed()
    assert not searched
    lm.model.model.layers[1].note = 7  # allowed, and looked for by name
    lm.on_weights_changed()
    assert searched


@pytest.mark.parametrize("layers", [2, 16])
def test_a_check_makes_few_calls_a_module(layers: int) -> None:
    model = make_model("llama", num_hidden_layers=layers)
    inventory = Inventory.of(model)
    inventory.check(model)
    modules = len(list(model.modules()))
    assert calls(lambda: inventory.check(model)) < 30 * modules
