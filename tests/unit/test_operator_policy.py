"""Arguments with which torch's own kernels read other memory or end the process: programs may not give them."""

from typing import Any

import pytest
import torch

from bsns.runtime.operator_policy import ALLOWED_OPERATORS, CheckedOperators, find_operator, refusal

FLOATS, INTEGERS = torch.ones(2, 4, 4, 4), torch.ones(2, 4, 4, dtype=torch.int64)
ONE, FOUR = torch.ones(1), torch.ones(4)
NORM = "aten._native_batch_norm_legit_no_training.default"


@pytest.mark.parametrize(
    ("name", "arguments", "keywords"),
    [
        (NORM, (FLOATS, None, None, ONE, FOUR, 0.1, 1e-5), {}),
        (NORM, (FLOATS, None, None, FOUR, ONE, 0.1, 1e-5), {}),
        (NORM, (FLOATS, ONE, None, FOUR, FOUR, 0.1, 1e-5), {}),
        (NORM, (FLOATS, FOUR, ONE, FOUR, FOUR, 0.1, 1e-5), {}),
        (NORM, (FLOATS[0, 0, 0], None, None, FOUR, FOUR, 0.1, 1e-5), {}),
        ("aten.div.Tensor_mode", (INTEGERS, INTEGERS), {"rounding_mode": "trunc"}),
        ("aten.div.Scalar_mode", (INTEGERS, -1), {"rounding_mode": "trunc"}),
        ("aten.avg_pool2d.default", (INTEGERS, [1, 1], [1, 1], [0, 0], False, True, -1), {}),
        ("aten.grid_sampler.default", (FLOATS, torch.zeros(2, 4, 4, 2), 7, 0, False), {}),
        ("aten.grid_sampler.default", (FLOATS[None], torch.zeros(1, 4, 4, 4, 3), 5, 5, False), {}),
        ("aten.upsample_nearest2d.default", (FLOATS, [64, 64], 1e-30, 1e-30), {}),
        ("aten.upsample_nearest2d.default", (FLOATS, [64, 64], float("nan"), None), {}),
        ("aten.upsample_bilinear2d.default", (FLOATS, [64, 64], False, 1.0, float("inf")), {}),
    ],
)
def test_arguments_that_torch_takes_unchecked_are_refused(
    name: str, arguments: tuple[Any, ...], keywords: dict[str, Any]
) -> None:
    # As a program is checked: without data, so that nothing is read or divided here.
    without_data = [item.to("meta") if isinstance(item, torch.Tensor) else item for item in arguments]
    with CheckedOperators(), pytest.raises((ValueError, RuntimeError), match=r"expected|integers|mode"):
        find_operator(name)(*without_data, **keywords)


def test_usual_arguments_of_the_same_operators_are_let_through() -> None:
    with CheckedOperators():
        find_operator(NORM)(FLOATS, FOUR, FOUR, FOUR, FOUR, 0.1, 1e-5)
        find_operator(NORM)(FLOATS, None, None, FOUR, FOUR, 0.1, 1e-5)
        find_operator("aten.div.Tensor_mode")(INTEGERS, INTEGERS, rounding_mode="floor")
        find_operator("aten.div.Tensor_mode")(FLOATS, FLOATS, rounding_mode="trunc")
        find_operator("aten.avg_pool2d.default")(FLOATS, [2, 2])
        find_operator("aten.grid_sampler.default")(FLOATS, torch.zeros(2, 4, 4, 2), 1, 2, False)
        find_operator("aten.upsample_nearest2d.vec")(FLOATS, None, [2.0, 0.5])


def test_every_allowed_operator_exists_and_has_an_overload_that_is_let_through() -> None:
    for packet in ALLOWED_OPERATORS:
        found = getattr(torch.ops.aten, packet)
        assert any(refusal(getattr(found, overload)) is None for overload in found.overloads()), packet


@pytest.mark.parametrize("name", ["", "aten", "aten..", "aten.relu", "aten.re lu.x", "aten.relu.__init__", "a.b.c"])
def test_name_of_no_operator_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"operator is named|torch knows no|no overload"):
        find_operator(name)
