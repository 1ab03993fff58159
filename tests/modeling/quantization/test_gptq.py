"""GPTQ and its refinement against slow references in float64, whole tensors."""

import numpy as np
import pytest
import torch
from torch import Tensor

from modeling_mistral_large.quantization.gptq import (
    CLIPPING,
    Factor,
    Hessian,
    choose_codes,
    choose_scales,
    quantize_weight,
    refine_codes,
    refine_scales,
)
from modeling_mistral_large.quantization.linear import Int4Linear, pack_words

ROWS, COLUMNS, GROUP = 7, 192, 32


@pytest.fixture
def weight() -> Tensor:
    return torch.randn(ROWS, COLUMNS)


@pytest.fixture
def inputs() -> Tensor:
    """Inputs whose columns depend on each other and have very different energies."""
    return torch.randn(400, COLUMNS) @ torch.randn(COLUMNS, COLUMNS) * torch.rand(COLUMNS).mul_(3)


@pytest.fixture
def factor(inputs: Tensor) -> Factor:
    hessian = Hessian(COLUMNS)
    for part in inputs.split(150):
        hessian.add(part.unsqueeze(0))
    return hessian.factor(0.01)


def damped(inputs: Tensor) -> np.ndarray:
    wide = inputs.double().numpy()
    hessian = wide.T @ wide
    wanted: np.ndarray = hessian + 0.01 * np.diag(hessian).mean() * np.eye(COLUMNS)
    return wanted


def by_optimal_brain_surgery(weight: Tensor, scales: Tensor, hessian: np.ndarray) -> np.ndarray:
    """Codes by the textbook: quantize a column, make up for it in all that are left, take it out of the inverse."""
    values, inverse = weight.double().numpy().copy(), np.linalg.inv(hessian)
    wide = scales.double().numpy().repeat(GROUP, axis=1)
    codes = np.zeros_like(values)
    left = np.ones(COLUMNS, bool)
    for column in np.argsort(-np.diag(hessian), kind="stable"):
        codes[:, column] = np.clip(np.round(values[:, column] / wide[:, column]), -8, 7)
        error = (values[:, column] - codes[:, column] * wide[:, column]) / inverse[column, column]
        left[column] = False
        values[:, left] -= np.outer(error, inverse[column, left])
        inverse -= np.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    return codes


def squared_error(weight: Tensor, codes: np.ndarray, scales: Tensor, hessian: np.ndarray) -> np.ndarray:
    """By row."""
    difference = codes * scales.double().numpy().repeat(GROUP, axis=1) - weight.double().numpy()
    by_row: np.ndarray = (difference @ hessian * difference).sum(axis=1)
    return by_row


def test_the_codes_are_those_of_the_textbook(weight: Tensor, inputs: Tensor, factor: Factor) -> None:
    scales = choose_scales(weight, factor.energy, GROUP)
    codes = choose_codes(weight, scales, factor)
    assert np.array_equal(codes.numpy(), by_optimal_brain_surgery(weight, scales, damped(inputs)))


def test_the_factor_is_that_of_the_inverse(inputs: Tensor, factor: Factor) -> None:
    hessian = damped(inputs)
    assert np.allclose(factor.hessian.numpy(), hessian, rtol=1e-5, atol=1e-6 * hessian.max())
    order = factor.order.numpy()
    wanted = np.linalg.cholesky(np.linalg.inv(hessian)[order][:, order]).T
    assert np.allclose(factor.upper.numpy(), wanted, rtol=1e-3, atol=1e-4 * abs(wanted).max())
    assert torch.equal(factor.upper, factor.upper.triu())


def test_refined_codes_are_the_best_of_all_sixteen(weight: Tensor, inputs: Tensor, factor: Factor) -> None:
    scales = choose_scales(weight, factor.energy, GROUP)
    codes = choose_codes(weight, scales, factor)
    hessian, wanted = damped(inputs), codes.double().numpy().copy()
    for column in np.argsort(-np.diag(hessian), kind="stable"):
        errors = []
        for code in range(-8, 8):
            wanted[:, column] = code
            errors.append(squared_error(weight, wanted, scales, hessian))
        wanted[:, column] = np.argmin(errors, axis=0) - 8
    assert np.array_equal(refine_codes(weight, codes, scales, factor).numpy(), wanted)


def test_refined_scales_are_the_least_squares(weight: Tensor, inputs: Tensor, factor: Factor) -> None:
    before = choose_scales(weight, factor.energy, GROUP)
    codes = choose_codes(weight, before, factor)
    root = np.linalg.cholesky(damped(inputs)).T
    for row, found in enumerate(refine_scales(weight, codes, before, factor.hessian)):
        by_group = np.zeros((COLUMNS, COLUMNS // GROUP))
        for column in range(COLUMNS):
            by_group[column, column // GROUP] = codes[row, column]
        wanted, *_ = np.linalg.lstsq(root @ by_group, root @ weight[row].double().numpy(), rcond=None)
        assert np.allclose(found.float().numpy(), wanted, rtol=2**-8)


def test_scales_cost_least_by_energy(weight: Tensor, factor: Factor) -> None:
    found = choose_scales(weight, factor.energy, GROUP)
    energy = factor.energy.double().view(-1, GROUP)
    groups = weight.double().view(ROWS, -1, GROUP)
    costs, candidates = [], []
    for share in CLIPPING:
        scales = (groups.abs().amax(-1) / 7.5 * share).bfloat16()
        rounded = (groups / scales.double().unsqueeze(-1)).round().clamp(-8, 7) * scales.double().unsqueeze(-1)
        costs.append(((rounded - groups).square() * energy).sum(-1))
        candidates.append(scales)
    best = torch.stack(costs).argmin(0, keepdim=True)
    assert torch.equal(found, torch.stack(candidates).gather(0, best)[0])


def test_each_step_makes_the_outputs_better(weight: Tensor, inputs: Tensor, factor: Factor) -> None:
    hessian = damped(inputs)

    def error(codes: Tensor, scales: Tensor) -> float:
        return float(squared_error(weight, codes.double().numpy(), scales, hessian).sum())

    largest = (weight.view(ROWS, -1, GROUP).abs().amax(-1) / 7.5).bfloat16()
    nearest = (weight / largest.float().repeat_interleave(GROUP, 1)).round().clamp(-8, 7)
    by_gptq, scales = quantize_weight(weight, factor, GROUP, rounds=0)
    once, once_scales = quantize_weight(weight, factor, GROUP, rounds=1)
    twice, twice_scales = quantize_weight(weight, factor, GROUP, rounds=2)
    errors = [
        error(nearest, largest),
        error(by_gptq.float() - 8, scales),
        error(once.float() - 8, once_scales),
        error(twice.float() - 8, twice_scales),
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[1] < 0.6 * errors[0]
    assert errors[2] < 0.95 * errors[1]


@pytest.mark.slow
def test_rows_do_not_depend_on_each_other(weight: Tensor, factor: Factor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modeling_mistral_large.quantization.gptq.ROWS_AT_ONCE", {"cpu": 2})
    codes, scales = quantize_weight(weight, factor, GROUP)
    for row in range(ROWS):
        own_codes, own_scales = quantize_weight(weight[row : row + 1], factor, GROUP)
        assert torch.equal(own_codes[0], codes[row])
        assert torch.equal(own_scales[0], scales[row])


def test_columns_without_inputs_and_groups_of_zeros(weight: Tensor, inputs: Tensor) -> None:
    inputs[:, 5:40] = 0
    weight[2] = 0
    weight[3, GROUP : 2 * GROUP] = 0
    hessian = Hessian(COLUMNS)
    hessian.add(inputs)
    codes, scales = quantize_weight(weight, hessian.factor(), GROUP)
    assert scales.isfinite().all()
    assert (scales > 0).all()
    assert (codes <= 15).all()
    # What no input reaches is rounded to the nearest, by a scale that fits its group.
    assert torch.equal(codes[2], torch.full((COLUMNS,), 8, dtype=torch.uint8))
    assert torch.equal(codes[3, 32:40], torch.full((8,), 8, dtype=torch.uint8))


def test_without_any_input_weights_are_rounded_to_the_nearest(weight: Tensor) -> None:
    hessian = Hessian(COLUMNS)
    hessian.add(torch.zeros(3, COLUMNS))
    codes, scales = quantize_weight(weight, hessian.factor(), GROUP, rounds=0)
    largest = (weight.view(ROWS, -1, GROUP).abs().amax(-1) / 7.5).bfloat16()
    assert torch.equal(scales, largest)
    nearest = (weight / largest.float().repeat_interleave(GROUP, 1)).round().clamp(-8, 7) + 8
    assert torch.equal(codes, nearest.to(torch.uint8))


def test_codes_are_what_the_linear_layer_reads(weight: Tensor, factor: Factor) -> None:
    codes, scales = quantize_weight(weight, factor, GROUP)
    linear = Int4Linear(COLUMNS, ROWS, group_size=GROUP)
    linear.weight_packed = torch.nn.Parameter(pack_words(codes), requires_grad=False)
    linear.weight_scale = torch.nn.Parameter(scales, requires_grad=False)
    rows = torch.cat(list(linear.dequantized_rows(torch.float32)))
    assert torch.equal(rows, (codes.float() - 8) * scales.float().repeat_interleave(GROUP, 1))
