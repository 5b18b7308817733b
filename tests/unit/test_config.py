"""Every option stands in the config once, and survives the way to disk and back."""

from __future__ import annotations

import dataclasses
import inspect
import json
from typing import Any

import pytest

import ordinal_prompt as op
from ordinal_prompt.config import HeadConfig

OTHERS: dict[str, Any] = {
    "ranks": ["bad", "fair", "good"], "rank_values": [1, 2, 4], "context": "a {} one", "rank_specific_context": True,
    "interpolation": "piecewise", "num_base_ranks": 2, "base_rank_names": ["bad", "good"], "in_features": 7,
    "normalize": False, "logit_scale": 1.5, "learn_logit_scale": True, "alignment": 0.5, "residual": 2.0,
    "confidence": 0.3, "learn_prompts": False, "kl_weight": 0.0, "freeze_text_encoder": False,
}  # fmt: skip


def test_the_head_takes_what_the_config_holds() -> None:
    parameters = inspect.signature(op.OrdinalPromptHead).parameters
    for field in dataclasses.fields(HeadConfig):
        default = parameters[field.name].default
        assert default == field.default or default is field.default is dataclasses.MISSING or field.name == "ranks"
    assert set(parameters) - {field.name for field in dataclasses.fields(HeadConfig)} == {
        "text_encoder", "tokenizer", "device", "dtype",
    }  # fmt: skip
    documented = op.OrdinalPromptHead.__doc__ or ""
    for name in parameters:
        assert f"{name}:" in documented or f"{name}, " in documented or f", {name}:" in documented, name


def test_to_json_and_back() -> None:
    for options in ({"ranks": 5}, OTHERS, {"ranks": 3, "interpolation": None, "tokens_per_rank": [1, 2, 3]}):
        config = HeadConfig(**options)
        again = HeadConfig(**json.loads(json.dumps(config.to_dict())))
        assert again == config
    with pytest.raises(TypeError, match="unexpected keyword argument 'later'"):
        HeadConfig(**{**config.to_dict(), "later": 1})


def test_what_differs_from_the_defaults_is_shown() -> None:
    assert HeadConfig(101).changed() == HeadConfig(2).changed() == HeadConfig(["a", "b"]).changed() == {}
    assert HeadConfig(3, interpolation=None).changed() == {"interpolation": None}
    assert HeadConfig(3, rank_values=[1, 2, 4], normalize=False).changed() == {
        "rank_values": (1.0, 2.0, 4.0), "normalize": False,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"alignment": -1}, ValueError, "`alignment` to be from 0 to 10000, but got -1"),
        ({"residual": "5"}, TypeError, "`residual` to be a number, but got '5'"),
        ({"confidence": 0}, ValueError, "`confidence` to be above 0"),
        ({"kl_weight": float("nan")}, ValueError, "`kl_weight` to be from 0"),
        ({"normalize": "no"}, TypeError, "`normalize` to be True or False, but got 'no'"),
        ({"learn_prompts": None}, TypeError, "`learn_prompts` to be True or False"),
        ({"logit_scale": "4"}, TypeError, "`logit_scale` to be a number"),
        ({"logit_scale": float("nan")}, ValueError, "`logit_scale` to be the log"),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        HeadConfig(5, **options)


def test_values_of_pandas_go_by_rank() -> None:
    pandas = pytest.importorskip("pandas")
    values = pandas.Series([4.0, 1.0, 2.0], index=[2, 0, 1])
    assert HeadConfig(3, rank_values=values).values == (1.0, 2.0, 4.0)
    with pytest.raises(ValueError, match="`rank_values` for the ranks 0…2, but got the index 5, 0, 1"):
        HeadConfig(3, rank_values=pandas.Series([1.0, 2.0, 4.0], index=[5, 0, 1]))
    assert HeadConfig(pandas.Series(["bad", "good"], index=[7, 8])).ranks == ("bad", "good")
