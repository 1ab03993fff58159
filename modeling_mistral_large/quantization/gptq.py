"""GPTQ: the codes of a weight chosen by what they do to its outputs on given inputs, one column after the other.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", 2023. Columns are
quantized in the order of their inputs' energy, and what rounding one column changes is made up for by the ones still to
come. Groups and their scales are fixed beforehand, in the order of the file, so that no column is moved: the format is
that of rounding to the nearest.

Then scales and codes are refined in turns, each the best for the other: scales by least squares, codes one column after
the other by coordinate descent. The measure is the same: the squared error of the outputs.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mistral_large_conversion.quantize import HALF_INT4_RANGE, SCALE_OF_ZEROS

LEAST_CODE, MOST_CODE = -8, 7
# Columns whose errors reach all others at once, as one product of matrices.
BLOCK_COLUMNS = 128
# Shares of the scale that reaches the largest weight of a group: a smaller one clips it, and rounds the others finer.
CLIPPING = tuple(step / 40 for step in range(24, 45))
# What a Hessian is damped by, as a share of the mean of its diagonal.
DAMPING = 0.01
# Turns of refining the scales and the codes.
ROUNDS = 2
# By how much, as a factor, a refined scale may differ from the one before.
MOST_CHANGE = 2.0
# Rows that are quantized at once, by kind of device: several copies of them are in memory. GPUs are slow on few.
ROWS_AT_ONCE = {"cpu": 2048, "cuda": 16384}


class Hessian:
    """The sum of x x' over all inputs x of a linear layer, in FP32: what a change of its weight does to its outputs."""

    def __init__(self, columns: int, device: torch.device | str = "cpu") -> None:
        self.sum = torch.zeros(columns, columns, device=device)

    def add(self, inputs: Tensor) -> None:
        """Add inputs [..., columns]."""
        rows = inputs.reshape(-1, inputs.shape[-1]).float()
        self.sum.addmm_(rows.t(), rows)

    def factor(self, damping: float = DAMPING) -> "Factor":
        """Damp the sum, in place, and factor its inverse; nothing can be added afterwards."""
        energy = self.sum.diagonal().clone()
        # A column whose inputs are all zero changes nothing; any positive number keeps the factor finite.
        self.sum.diagonal()[energy == 0] = 1
        self.sum.diagonal().add_(damping * self.sum.diagonal().mean())
        # Ties in the order of the columns, on every device.
        order = torch.argsort(energy, descending=True, stable=True)
        # inv(H) = U' U with U the inverse of M, where H = M M' and M is upper triangular: the Cholesky factor of H with
        # its columns the other way round. It takes neither an inverse of H nor a second Cholesky factor.
        backwards = order.flip(0)
        # In place where it can be: at no time are there more than three matrices of this size.
        lower = self.sum[backwards][:, backwards]
        torch.linalg.cholesky(lower, out=lower)
        upper = lower.flip(0, 1)
        del lower
        inverse = torch.eye(len(upper), device=upper.device)
        torch.linalg.solve_triangular(upper, inverse, upper=True, out=inverse)
        return Factor(self.sum, inverse, order, energy)


@dataclass(frozen=True)
class Factor:
    """A damped Hessian, and the upper triangular U of its inverse U' U, whose rows and columns are in `order`.

    energy: the undamped diagonal of the Hessian.
    """

    hessian: Tensor
    upper: Tensor
    order: Tensor
    energy: Tensor


def quantize_weight(weight: Tensor, factor: Factor, group_size: int, rounds: int = ROUNDS) -> tuple[Tensor, Tensor]:
    """Return codes 0…15 as uint8 [rows, columns] and BF16 scales [rows, columns / group_size] of a weight.

    A weight is (code - 8) * scale, as in `mistral_large_conversion.checkpoint.quantization`.
    """
    codes, scales = [], []
    step = ROWS_AT_ONCE[weight.device.type]
    for start in range(0, len(weight), step):
        rows = weight[start : start + step].float()
        of_rows = choose_scales(rows, factor.energy, group_size)
        chosen = choose_codes(rows, of_rows, factor)
        for _ in range(rounds):
            of_rows = refine_scales(rows, chosen, of_rows, factor.hessian)
            chosen = refine_codes(rows, chosen, of_rows, factor)
        codes.append(chosen.sub_(LEAST_CODE).to(torch.uint8))
        scales.append(of_rows)
    return torch.cat(codes), torch.cat(scales)


def choose_codes(weight: Tensor, scales: Tensor, factor: Factor) -> Tensor:
    """Return whole numbers -8…7 as FP32 [rows, columns]: GPTQ with these scales."""
    order, upper = factor.order, factor.upper
    left = weight[:, order]  # what is still to be quantized, with the errors of what is made up for
    codes = torch.empty_like(weight)
    groups = (order // (weight.shape[1] // scales.shape[1])).tolist()
    wide = scales.float().t().contiguous()  # [groups, rows]
    for start in range(0, len(order), BLOCK_COLUMNS):
        columns = order[start : start + BLOCK_COLUMNS]
        end = start + len(columns)
        block = left[:, start:end].t().contiguous()  # [columns, rows]
        errors, rounded = torch.empty_like(block), torch.empty_like(block)
        for index, place in enumerate(range(start, end)):
            scale = wide[groups[place]]
            rounded[index] = code = (block[index] / scale).round_().clamp_(LEAST_CODE, MOST_CODE)
            errors[index] = (block[index] - code * scale) / upper[place, place]
            block[index + 1 :].addr_(upper[place, place + 1 : end], errors[index], alpha=-1)
        codes[:, columns] = rounded.t()
        left[:, end:].addmm_(errors.t(), upper[start:end, end:], alpha=-1)
    return codes


def refine_codes(weight: Tensor, codes: Tensor, scales: Tensor, factor: Factor) -> Tensor:
    """Return codes each of which is the best for all the others', in one pass over the columns by their energy."""
    order, hessian = factor.order, factor.hessian
    group_size = weight.shape[1] // scales.shape[1]
    groups = (order // group_size).tolist()
    wide = scales.float()
    # Half the gradient of the squared error, column by column.
    slope = (codes * wide.repeat_interleave(group_size, 1) - weight) @ hessian
    wide = wide.t().contiguous()  # [groups, rows]
    codes = codes.clone()
    for start in range(0, len(order), BLOCK_COLUMNS):
        columns = order[start : start + BLOCK_COLUMNS]
        inside = hessian[columns][:, columns]
        block = slope[:, columns].t().contiguous()  # [columns, rows]
        chosen, changes = codes[:, columns].t().contiguous(), torch.empty_like(block)
        for index in range(len(columns)):
            scale = wide[groups[start + index]]
            best = chosen[index] - block[index] / (inside[index, index] * scale)
            best = best.round_().clamp_(LEAST_CODE, MOST_CODE)
            changes[index] = (best - chosen[index]) * scale
            chosen[index] = best
            block[index + 1 :].addr_(inside[index, index + 1 :], changes[index])
        codes[:, columns] = chosen.t()
        slope.addmm_(changes.t(), hessian[columns])
    return codes


def refine_scales(weight: Tensor, codes: Tensor, scales: Tensor, hessian: Tensor) -> Tensor:
    """Return the BF16 scales that are the best for these codes, by least squares over all groups of a row."""
    rows, groups = scales.shape
    by_group = (rows, groups, -1)
    # With B the codes of a row, one column a group: (B' H B) s = B' H w.
    left = torch.empty(rows, groups, groups, device=weight.device)
    for group, (columns, part) in enumerate(
        zip(hessian.view(groups, -1, len(hessian)), codes.view(by_group).unbind(1), strict=True)
    ):
        left[:, group] = (part @ columns).mul_(codes).view(by_group).sum(-1)
    right = (weight @ hessian).mul_(codes).view(by_group).sum(-1)
    # A group of zeros has no scale of its own.
    diagonal = left.diagonal(dim1=1, dim2=2)
    diagonal.add_(1e-6 * diagonal.mean(-1, keepdim=True) + 1e-30)
    before = scales.float()
    found = torch.linalg.solve(left, right)
    is_near = (found > before / MOST_CHANGE) & (found < before * MOST_CHANGE)
    return torch.where(is_near, found, before).bfloat16()


def choose_scales(weight: Tensor, energy: Tensor, group_size: int) -> Tensor:
    """Return BF16 scales [rows, columns / group_size] by which rounding costs least, by the energy of each column."""
    groups, energy = weight.view(len(weight), -1, group_size), energy.view(-1, group_size)
    largest = groups.abs().amax(-1) / HALF_INT4_RANGE
    best, least = torch.empty_like(largest, dtype=torch.bfloat16), torch.full_like(largest, torch.inf)
    # From no clipping on, which an equal cost does not take the place of.
    for share in sorted(CLIPPING, key=lambda share: abs(share - 1)):
        scales = (largest * share).bfloat16()
        scales[scales == 0] = SCALE_OF_ZEROS
        wide = scales.float().unsqueeze(-1)
        rounded = (groups / wide).round_().clamp_(LEAST_CODE, MOST_CODE).mul_(wide)
        cost = (rounded.sub_(groups).square_() * energy).sum(-1)
        is_better = cost < least
        best[is_better] = scales[is_better]
        least = torch.minimum(least, cost)
    return best
