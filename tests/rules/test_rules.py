"""λ rules: what rows decide, depth, groups, and every refusal by its message."""

from __future__ import annotations

import json
import pickle
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pa_fast import LambdaRule
from pa_fast.base import Lambda
from pa_fast.errors import UsageError
from pa_fast.rules.names import GROUPS, group, layer

LAYERS = 5
LEAVES = ("self_attn.q_proj", "self_attn.q_norm", "mlp.down_proj", "input_layernorm")
NAMES = [
    "model.embed_tokens.weight",
    *(f"model.layers.{n}.{leaf}.weight" for n in range(LAYERS) for leaf in LEAVES),
    "model.norm.weight",
    "lm_head.weight",
]


def keys(rule: LambdaRule, names: list[str] = NAMES) -> dict[str, str]:
    return {name: lam.key for name, lam in rule.resolve(names).items()}


def test_the_first_row_that_matches_decides_and_the_rest_has_the_swept_lambda() -> None:
    rule = LambdaRule(
        [
            {"match": "*.layers.0.mlp.*", "lambda": 0},
            {"group": "mlp", "times": "1/3"},
            {"match": ["lm_head.*", "model.norm.*"], "lambda": 1.5},
            {"match": "*.layers.?.*", "group": "norms", "times": 2},
        ]
    )
    found = keys(rule.at("0.3"))
    assert found["model.layers.0.mlp.down_proj.weight"] == "0"
    assert found["model.layers.1.mlp.down_proj.weight"] == "0.1"
    assert found["lm_head.weight"] == found["model.norm.weight"] == "1.5"
    assert (
        found["model.layers.2.self_attn.q_norm.weight"]
        == found["model.layers.0.input_layernorm.weight"]
        == "0.6"
    )
    assert (
        found["model.embed_tokens.weight"]
        == found["model.layers.4.self_attn.q_proj.weight"]
        == "0.3"
    )
    assert keys(rule)["model.embed_tokens.weight"] == "1", "a rule by itself is at λ = 1"
    assert {touch.row: touch.tensors for touch in rule.touched(NAMES)} == {
        'match: "*.layers.0.mlp.*", lambda: "0"': 1,
        'group: mlp, times: "1/3"': 4,
        'match: ["lm_head.*", "model.norm.*"], lambda: "1.5"': 2,
        'match: "*.layers.?.*", group: norms, times: "2"': 10,
        "no row": 6,
    }


def test_a_schedule_runs_from_the_first_layer_to_the_last() -> None:
    rule = LambdaRule(
        [
            {"group": "mlp", "lambda": {0: 0.2, 1: 1}},
            {"group": "attention", "times": {0.25: 0, "0.5": 1, 0.75: 0.5}},
        ]
    )
    found = keys(rule.at(0.4))
    assert [found[f"model.layers.{n}.mlp.down_proj.weight"] for n in range(LAYERS)] == [
        "0.2",
        "0.4",
        "0.6",
        "0.8",
        "1",
    ]
    assert [found[f"model.layers.{n}.self_attn.q_proj.weight"] for n in range(LAYERS)] == [
        "0",
        "0",
        "0.4",
        "0.2",
        "0.2",
    ]
    mlp, _, _ = rule.at(0.4).touched(NAMES)
    assert (
        str(mlp) == 'rule (group: mlp, lambda: {"0": "0.2", "1": "1"}): 5 tensors such as'
        " `model.layers.0.mlp.down_proj.weight`, λ = 0.2 to 1"
    )


def test_stacks_have_depths_of_their_own() -> None:
    names = [f"vision.blocks.{n}.mlp.weight" for n in range(3)] + [
        f"text.layers.{n}.mlp.experts.7.weight" for n in range(2)
    ]
    found = keys(LambdaRule([{"match": "*", "lambda": {0: 0, 1: 1}}]), [*names, "one.0.mlp.weight"])
    assert list(found.values()) == ["0", "0.5", "1", "0", "1", "0"]
    assert (
        layer("text.layers.1.mlp.experts.7.weight") == ("text.layers", 1)
        and layer("lm_head.weight") is None
    )


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.0.self_attn.q_proj.weight", "attention"),
        ("model.layers.0.self_attn.q_norm.weight", "norms"),
        ("model.layers.0.post_attention_layernorm.weight", "norms"),
        ("model.layers.0.pre_feedforward_layernorm.weight", "norms"),
        ("transformer.h.0.ln_1.bias", "norms"),
        ("transformer.ln_f.weight", "norms"),
        ("transformer.h.0.attn.c_attn.weight", "attention"),
        ("transformer.h.0.mlp.c_fc.weight", "mlp"),
        ("transformer.wte.weight", "embeddings"),
        ("gpt_neox.embed_in.weight", "embeddings"),
        ("embed_out.weight", "embeddings"),
        ("lm_head.weight", "embeddings"),
        ("gpt_neox.layers.3.attention.query_key_value.weight", "attention"),
        ("transformer.h.0.self_attention.dense.weight", "attention"),
        ("model.layers.0.block_sparse_moe.experts.0.w1.weight", "mlp"),
        ("model.layers.0.block_sparse_moe.gate.weight", "mlp"),
        ("model.layers.0.mlp.shared_expert_gate.weight", "mlp"),
        ("model.layers.0.feed_forward.w1.weight", "mlp"),
        ("model.decoder.layers.0.fc1.weight", "mlp"),
        ("model.layers.0.linear_attn.in_proj.weight", "attention"),
        ("bert.embeddings.LayerNorm.weight", "norms"),
        ("backbone.layers.0.mixer.A_log", None),
    ],
)
def test_groups_go_by_the_parts_of_a_name(name: str, expected: str | None) -> None:
    assert group(name) == expected


ROWS = st.lists(
    st.fixed_dictionaries(
        {"group": st.sampled_from(sorted(GROUPS))},
        optional={"match": st.sampled_from(["*", "model.*"])},
    ).flatmap(
        lambda row: st.sampled_from(["lambda", "times"]).flatmap(
            lambda key: st.fractions(-2, 3, max_denominator=60).map(
                lambda value: {**row, key: f"{value}"}
            )
        )
    ),
    min_size=1,
    max_size=4,
    unique_by=lambda row: row["group"],
)


@settings(max_examples=60)
@given(ROWS, st.fractions(-2, 3, max_denominator=60))
def test_rows_survive_every_form_and_decide_exactly(
    rows: list[dict[str, str]], lam: Fraction
) -> None:
    rule = LambdaRule(rows).at(lam)
    again = LambdaRule(json.loads(json.dumps(rule.document())), lam)
    assert again == rule and hash(again) == hash(rule) and pickle.loads(pickle.dumps(rule)) == rule
    found = rule.resolve(NAMES)
    for name in NAMES:
        row = next(
            (
                r
                for r in rows
                if r["group"] == group(name)
                and (r.get("match") != "model.*" or name[:6] == "model.")
            ),
            None,
        )
        value = (
            lam
            if row is None
            else Fraction(row["lambda"])
            if "lambda" in row
            else lam * Fraction(row["times"])
        )
        assert found[name].exact == value
    assert rule.at(7) != rule


def test_a_file_is_the_same_as_its_rows(tmp_path: Path) -> None:
    file = tmp_path / "rule.yaml"
    file.write_text(
        "# norms as in instruct\n- {group: norms, lambda: 1}\n- match: '*.layers.0.*'\n  times:"
        " 1/2\n- {group: mlp, times: {0: 0.2, 1: 1e0}}\n- {match: [lm_head.*], lambda: .5}\n"
    )
    rows = [
        {"group": "norms", "lambda": 1},
        {"match": "*.layers.0.*", "times": "1/2"},
        {"group": "mlp", "times": {0: 0.2, 1: 1}},
        {"match": "lm_head.*", "lambda": 0.5},
    ]
    assert (
        LambdaRule.load(file)
        == LambdaRule(rows)
        == LambdaRule.of(rows)
        == LambdaRule.of(file)
        == LambdaRule.of(str(file))
    )
    saved = tmp_path / "again.yaml"
    saved.write_text(json.dumps(LambdaRule.load(file).document()))
    assert LambdaRule.load(saved) == LambdaRule(rows)


BROKEN = {
    "- {group: mlp, lamda: 1}": r"rule\.yaml: row 1: unknown key `lamda`.*did you mean `lambda`",
    "- {group: mlp, lambda: 1}\n- {group: norms, times: 1, when: 2}": (
        r"rule\.yaml: row 2: unknown key `when`"
    ),
    "- {group: mlp}": "row 1: found neither `lambda` nor `times`",
    "- {group: mlp, lambda: 1, times: 2}": "row 1: found both `lambda` and `times`",
    "- {lambda: 1}": "row 1: found neither `match` nor `group`",
    "- {group: heads, lambda: 1}": (
        "row 1: `group` is 'heads', expected norms, embeddings, attention, mlp"
    ),
    "- {group: [mlp], lambda: 1}": "row 1: `group` is a list",
    "- {match: [], lambda: 1}": "row 1: `match` is an empty list",
    "- {match: [[a]], lambda: 1}": "row 1: `match` is a list, expected a pattern",
    "- {match: '', lambda: 1}": "row 1: `match` is '', expected a pattern",
    "- {match: a, lambda: no}": "row 1: `lambda` is 'no', expected a number",
    "- {match: a, lambda: .inf}": r"row 1: `lambda` is '\.inf', expected a number",
    "- {match: a, lambda: }": "row 1: `lambda` is '', expected a number",
    "- {match: a, lambda: [1]}": "row 1: `lambda` is a list, expected a number",
    "- {match: a, times: 1/0}": "row 1: `times` is '1/0', expected a number",
    "- {match: a, times: {0: 1}}": "row 1: `times`: a schedule of 1 points",
    "- {match: a, times: {0: 1, 2: 1}}": (
        "row 1: `times`: depths 0, 2, expected different ones from 0 to 1"
    ),
    "- {match: a, times: {0.5: 1, 1/2: 1}}": r"row 1: `times`: depths 0\.5, 0\.5",
    "- {match: a, times: {x: 1, 1: 1}}": "row 1: `times`, depth is 'x', expected a number",
    "- {match: a, times: {0: {}, 1: 1}}": "row 1: `times` is a dict, expected a number",
    "- {match: a, lambda: 1, lambda: 2}": r"rule\.yaml:1: `lambda` is given twice",
    "- {match: a, times: {0: 1, 0: 2}}": r"rule\.yaml:1: `0` is given twice",
    "- &a {match: a, lambda: 1}\n- *a": r"rule\.yaml:1: found an alias",
    "- {? [a] : 1}": r"rule\.yaml:1: a key is no plain text",
    "- mlp": "row 1: found 'mlp', expected a mapping",
    "rules: []": "expected a list of rows",
    "mlp": "expected a list of rows",
    "": "found no row",
    "[]": "found no row",
    "- {group: mlp": "not YAML",
    "- !!python/object:os.system {match: a, lambda: x}": "row 1: `lambda` is 'x'",
    "- \x00": "not YAML",
    "[" * 5000: "not YAML",
}


@pytest.mark.parametrize("text", BROKEN)
def test_what_is_no_rule_is_refused_with_file_and_key(tmp_path: Path, text: str) -> None:
    file = tmp_path / "rule.yaml"
    file.write_text(text)
    with pytest.raises(UsageError, match="(?s)" + BROKEN[text]) as caught:
        LambdaRule.load(file)
    assert str(file) in caught.value.message and caught.value.hint and len(str(caught.value)) < 600


@settings(max_examples=150)
@given(st.text(alphabet="-{}[]:,*&!?'\"# \nmatchgroupl0.1/", max_size=60))
def test_any_text_is_a_rule_or_refused(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    file = tmp_path_factory.getbasetemp() / "any.yaml"
    file.write_text(text)
    try:
        assert LambdaRule.load(file).rows
    except UsageError as error:
        assert str(file) in error.message


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"absent.yaml: the rule cannot be read: No such file"):
        LambdaRule.load(tmp_path / "absent.yaml")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(UsageError, match="bytes: not YAML"):
        LambdaRule.load(tmp_path / "bytes")
    (tmp_path / "large").write_text("#" * 1_000_001)
    with pytest.raises(UsageError, match="1000001 bytes, expected a rule of at most"):
        LambdaRule.load(tmp_path / "large")
    for rows in (3, "mlp", {"group": "mlp"}, [True], [{"match": "*", "lambda": True}]):
        with pytest.raises(UsageError, match="rule: "):
            LambdaRule(rows)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("rows", "message", "hint"),
    [
        (
            [{"match": "*.mlp.dwn_proj.*", "lambda": 1}],
            r"row 1 \(.*no tensor has a name like `\*\.mlp\.dwn_proj\.\*`",
            "`model.layers.*.mlp.down_proj.weight`",
        ),
        (
            [{"match": ["*", "lm_head"], "lambda": 1}],
            "no tensor has a name like `lm_head`",
            "`lm_head.weight`",
        ),
        (
            [{"match": "lm_head.*", "group": "mlp", "lambda": 1}],
            "no tensor of group `mlp` has such a name",
            "mlp 5",
        ),
        (
            [{"match": "*", "lambda": 1}, {"group": "mlp", "lambda": 0}],
            r"row 2 .*decides nothing.*all 5",
            "move it up",
        ),
        (
            [{"match": "*", "times": {0: 0, 1: 1}}],
            "`model.embed_tokens.weight` has no layer number",
            r"*.layers.*",
        ),
    ],
)
def test_rows_that_do_not_fit_a_model(
    rows: list[dict[str, object]], message: str, hint: str
) -> None:
    with pytest.raises(UsageError, match="(?s)" + message) as caught:
        LambdaRule(rows).resolve(NAMES)
    assert hint in str(caught.value.hint)


def test_a_rule_that_is_asked_with_a_part_of_a_model_says_so() -> None:
    rule = LambdaRule([{"match": "*norm*", "lambda": 1}, {"match": "*.mlp.*", "times": 0}])
    with pytest.raises(UsageError, match="row 2") as caught:
        rule.resolve(["model.norm.weight"])
    assert "all names of a model; among these 1: `model.norm.weight`" in str(caught.value.hint)


def test_a_group_that_a_model_lacks() -> None:
    with pytest.raises(UsageError, match="no tensor of group `mlp`") as caught:
        LambdaRule([{"group": "mlp", "lambda": 0}]).resolve(["a.attn.weight", "norm.weight"])
    assert "norms 1, attention 1" in str(caught.value.hint)


def test_a_lambda_that_leaves_fp32_is_refused() -> None:
    with pytest.raises(UsageError, match="does not fit in fp32"):
        LambdaRule([{"match": "*", "times": "1e38"}]).at(1000).resolve(NAMES)
    assert LambdaRule([{"match": "*", "times": 3}]).at("0.1").resolve(["w"])["w"] == Lambda("0.3")
