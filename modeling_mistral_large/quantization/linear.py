"""Linear layers that keep their weights in FP8 or in 4 bits.

The checkpoints are those of `mistral_large_conversion.checkpoint.quantization`. transformers itself
dequantizes all weights to BF16 where it has no kernel. These layers never do: without a kernel, as for FP8 on the CPU,
each product dequantizes a few rows at a time and drops them.

Bytes of a linear layer with a weight [out, in] at run time, see `mistral_large_conversion.sharding`: fp8 takes
out * in + 4 * out, int4 takes out * in / 2 + 4 * out * in / group, half of the latter in the packed layout. While
torch's kernel layout is made, int4 holds one weight twice.
"""

from collections.abc import Callable, Iterator
from functools import cache

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from mistral_large_conversion.checkpoint.quantization import CODES_PER_WORD, GROUP_SIZE
from mistral_large_conversion.quantize import LARGEST_FP8
from mistral_large_conversion.sharding.memory import DEQUANTIZED_AT_ONCE
from modeling_mistral_large.quantization import gpu_int4
from modeling_mistral_large.transformers_api.models import LocalShards

# The kernel for 4 bits reads the weights again for every few tokens: for more, dequantizing is faster.
MOST_TOKENS_OF_KERNEL = 32
ALIGNED_ROWS = 256
# E4M3 bits shifted into BF16 keep a bias of 7 instead of 127: the value comes out 2**-120 too small.
SIGN_AND_LOW_BITS = -0x7810
FP8_TO_BF16 = 2.0**120
# torch's FP8 product with a scale for each row ignored the current stream there, and could hang on many tokens.
IS_SAFE_ON_8_9 = torch.torch_version.TorchVersion(torch.__version__) >= "2.12"


class QuantizedLinear(LocalShards, nn.Module):
    """A linear layer without bias that keeps its weight [out_features, in_features] quantized.

    Calls of `to` move it to another device, but to no other dtype. Under tensor parallelism a rank holds some rows or
    columns of it, and `in_features` and `out_features` are those of all ranks together.
    """

    weight_scale: Tensor

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features

    def hold_(self, **tensors: Tensor) -> None:
        """Take tensors as parameters, which are not trained."""
        for name, tensor in tensors.items():
            setattr(self, name, nn.Parameter(tensor, requires_grad=False))

    def check_groups(self, columns: int, group_size: int) -> None:
        """Check that the columns of a rank's shard are those of its scales."""
        if columns != self.weight_scale.shape[1] * group_size:
            raise ValueError(
                f"tensor parallelism: {columns} columns for a rank are no whole number of groups of {group_size}; use "
                "fewer ranks, or device_map instead"
            )

    def after_loading_(self) -> None:
        """Bring what was loaded into the layout of the kernel; a ValueError for a shard that cannot be used."""
        raise NotImplementedError

    def file_tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds of the layer."""
        raise NotImplementedError

    def dequantized_rows(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """All rows of the weight, some at a time, in `dtype`; those in FP8 without their scales."""
        raise NotImplementedError

    def dequantized_product(self, hidden: Tensor) -> Tensor:
        """hidden @ weight.T with dequantized rows of the weight."""
        return torch.cat([nn.functional.linear(hidden, rows) for rows in self.dequantized_rows(hidden.dtype)], dim=-1)

    def rows_at_once(self) -> int:
        # A loop would make a compiled graph long.
        if torch.compiler.is_compiling():
            return self.out_features
        device = next(self.parameters()).device.type
        rows = -(-DEQUANTIZED_AT_ONCE.get(device, DEQUANTIZED_AT_ONCE["cpu"]) // self.in_features)
        # A GPU multiplies matrices that are not aligned by slow kernels.
        return rows if device == "cpu" else -(-rows // ALIGNED_ROWS) * ALIGNED_ROWS

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(move, recurse)  # type: ignore[no-untyped-call]  # torch does not type it
        return self

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class Fp8Linear(QuantizedLinear):
    """Weights in FP8 with an FP32 scale for each row; activations are quantized to FP8 token by token.

    W8A8 on every device. With row-parallel sharding, each rank quantizes its own slice of the activations. For BF16
    models a kernel multiplies FP8 with FP8 on GPUs that have one.
    """

    weight: Tensor

    def __init__(self, in_features: int, out_features: int, *, device: torch.device | str | None = None) -> None:
        super().__init__(in_features, out_features)
        self.hold_(
            weight=torch.empty(out_features, in_features, dtype=torch.float8_e4m3fn, device=device),
            # BF16 in the file; the kernel takes FP32.
            weight_scale=torch.empty(out_features, 1, dtype=torch.float32, device=device),
        )

    def after_loading_(self) -> None:
        if isinstance(self.weight_scale, DTensor) and self.weight_scale.placements == (Shard(1),):
            # Shards of columns have the scales of whole rows.
            self.hold_(weight_scale=self.weight_scale.full_tensor())

    def file_tensors(self) -> dict[str, Tensor]:
        return {"weight": self.weight.detach(), "weight_scale": self.weight_scale.detach().bfloat16()}

    def dequantized_rows(self, dtype: torch.dtype) -> Iterator[Tensor]:
        step = self.rows_at_once()
        for start in range(0, self.weight.shape[0], step):
            yield dequantize_fp8(self.weight[start : start + step]).to(dtype)

    def forward(self, hidden: Tensor) -> Tensor:
        codes, scales = round_to_fp8(hidden.reshape(-1, hidden.shape[-1]))
        weight_scales = self.weight_scale.float().t()  # [1, out_features]
        if hidden.dtype == torch.bfloat16 and hidden.is_cuda and has_fp8_kernel(hidden.device):
            product = torch._scaled_mm(
                codes, self.weight.t(), scale_a=scales, scale_b=weight_scales, out_dtype=torch.bfloat16
            )
        else:
            # Sums of codes are too large for float16.
            wide = torch.bfloat16 if hidden.dtype == torch.bfloat16 else torch.float32
            product = self.dequantized_product(codes.to(wide)).float() * scales * weight_scales
        return product.to(hidden.dtype).reshape(*hidden.shape[:-1], -1)


def round_to_fp8(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """FP8 codes of [tokens, features] and FP32 scales [tokens, 1]; a code times its scale is the value."""
    scales = tokens.abs().amax(-1, keepdim=True).float() / LARGEST_FP8
    # Nothing but zeros has the scale 1.
    scales = torch.where(scales > 0, scales, 1.0)
    # In place: this is the widest tensor of a long prompt.
    wide = tokens.to(torch.float32, copy=True).div_(scales).clamp_(-LARGEST_FP8, LARGEST_FP8)
    return wide.to(torch.float8_e4m3fn), scales


def dequantize_fp8(codes: Tensor) -> Tensor:
    """The BF16 values of FP8 codes, which are all exact; NaN, which no checkpoint of ours holds, becomes 480."""
    if codes.device.type != "cpu":
        return codes.bfloat16()
    # torch converts one element at a time here.
    bits = (codes.view(torch.int8).to(torch.int16) << 4) & SIGN_AND_LOW_BITS
    return bits.view(torch.bfloat16) * FP8_TO_BF16


def has_fp8_kernel(gpu: torch.device) -> bool:
    """Whether FP8 matrices with a scale for each row can be multiplied on a GPU."""
    least = (8, 9) if IS_SAFE_ON_8_9 else (9, 0)
    return torch.version.hip is None and torch.cuda.get_device_capability(gpu) >= least


class Int4Linear(QuantizedLinear):
    """Weights in 4 bits with a BF16 scale for each group; activations are not quantized: W4A16 on every device.

    It is loaded in the packed layout of the file, eight codes in a word of 32 bits, in which it stays on GPUs with
    Triton. Elsewhere `use_kernel_` brings it into the kernel layout of torch, where there is one: the same bytes in
    another order, and a zero next to each scale.
    """

    weight_packed: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        group_size: int = GROUP_SIZE,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(in_features, out_features)
        self.group_size = group_size
        words = torch.empty(out_features, in_features // CODES_PER_WORD, dtype=torch.int32, device=device)
        scales = torch.empty(out_features, in_features // group_size, dtype=torch.bfloat16, device=device)
        self.hold_(weight_packed=words, weight_scale=scales)
        # The kernel layout of the weight, or None for the packed layout of the file.
        self.layout: KernelLayout | None = None

    @property
    def rows(self) -> int:
        return self.scales().shape[0]

    @property
    def columns(self) -> int:
        return self.scales().shape[1] * self.group_size

    def after_loading_(self) -> None:
        if isinstance(self.weight_packed, DTensor) and isinstance(self.weight_scale, DTensor):
            self.hold_(weight_packed=self.weight_packed.to_local(), weight_scale=self.weight_scale.to_local())
            self.check_groups(self.weight_packed.shape[1] * CODES_PER_WORD, self.group_size)
        self.use_kernel_()

    def use_kernel_(self) -> None:
        """Bring the weight into the kernel layout of its device, if that has one for this shape."""
        layout = None if self.layout else kernel_layout(self.weight_packed.device)
        if layout is None or self.rows % layout.rows or self.columns % layout.columns:
            return
        packed = torch.cat([layout.pack(self.codes(*span)).flatten() for span in self._spans(layout.rows)])
        scales = self.weight_scale.detach().t()
        # [in_features / group, out_features, 2]
        scales_and_zeros = torch.stack((scales, torch.zeros_like(scales)), dim=-1).contiguous()
        shape = layout.shape(self.rows, self.columns)
        self.hold_(weight_packed=packed.view(shape), weight_scale=scales_and_zeros)
        self.layout = layout

    def use_packed_layout_(self) -> None:
        """Undo `use_kernel_`."""
        tensors = self.file_tensors()
        self.hold_(weight_packed=tensors["weight_packed"], weight_scale=tensors["weight_scale"])
        self.layout = None

    def scales(self) -> Tensor:
        """The scales [out_features, in_features / group]."""
        return self.weight_scale if self.layout is None else self.weight_scale[..., 0].t()

    def codes(self, start: int, end: int) -> Tensor:
        """Codes 0…15 of some rows, as uint8 [end - start, in_features]."""
        if self.layout is None:
            return unpack_words(self.weight_packed[start:end])
        row_bytes = self.columns // 2
        rows = self.weight_packed.flatten().view(torch.uint8)[start * row_bytes : end * row_bytes]
        return self.layout.unpack(rows, self.columns)

    def file_tensors(self) -> dict[str, Tensor]:
        packed = self.weight_packed.detach()
        if self.layout is not None:
            packed = torch.cat([pack_words(self.codes(*span)) for span in self._spans()])
        return {
            "weight_packed": packed,
            "weight_scale": self.scales().detach().contiguous(),
            "weight_shape": torch.tensor([self.rows, self.columns]),
        }

    def dequantized_rows(self, dtype: torch.dtype) -> Iterator[Tensor]:
        scales = self.scales().to(dtype)
        if self._has_kernels(dtype):
            for start, end in self._spans():
                yield gpu_int4.dequantize_int4(self.weight_packed[start:end], scales[start:end])
            return
        for start, end in self._spans():
            groups = (self.codes(start, end).to(dtype) - 8).view(end - start, -1, self.group_size)
            yield (groups * scales[start:end, :, None]).flatten(-2)

    def _spans(self, multiple: int = 1) -> list[tuple[int, int]]:
        """First and last row of what is dequantized at once: whole tiles of the kernel layout, or `multiple` rows."""
        multiple = multiple if self.layout is None else self.layout.rows
        step = -(-self.rows_at_once() // multiple) * multiple
        return [(start, min(start + step, self.rows)) for start in range(0, self.rows, step)]

    def forward(self, hidden: Tensor) -> Tensor:
        tokens = hidden.reshape(-1, hidden.shape[-1])
        if self.layout is not None and self.layout.multiplies(tokens):
            product = self.layout.multiply(tokens, self.weight_packed, self.weight_scale, self.group_size)
        elif (
            self._has_kernels(tokens.dtype)
            and tokens.shape[0] <= gpu_int4.MOST_TOKENS
            and self.group_size in gpu_int4.GROUP_SIZES
        ):
            product = gpu_int4.int4_product(tokens, self.weight_packed, self.weight_scale)
        else:
            product = self.dequantized_product(tokens)
        return product.reshape(*hidden.shape[:-1], -1)

    def _has_kernels(self, dtype: torch.dtype) -> bool:
        is_packed = self.layout is None and dtype == torch.bfloat16
        return is_packed and gpu_int4.has_int4_kernels(self.weight_packed.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        layout = self.layout
        if layout is None or fn(torch.empty(0, device=layout.device)).device == layout.device:
            return super()._apply(fn, recurse)
        self.use_packed_layout_()
        super()._apply(fn, recurse)
        self.use_kernel_()
        return self

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, group_size={self.group_size}"


def unpack_words(words: Tensor) -> Tensor:
    """Codes 0…15 as uint8 [rows, columns] of words [rows, columns / 8]; the first code is in the lowest bits."""
    return halves(words.view(torch.uint8))


def pack_words(codes: Tensor) -> Tensor:
    """The words of codes; undoes `unpack_words`."""
    return (codes[:, 0::2] | codes[:, 1::2] << 4).view(torch.int32)


def halves(pairs: Tensor) -> Tensor:
    """The lower and the upper four bits of each byte, in this order."""
    return torch.stack((pairs & 15, pairs >> 4), dim=-1).flatten(-2)


class KernelLayout:
    """torch's kernel for 4 bits on a device, and the order in which it wants the codes.

    The weight is cut into tiles [rows, columns], one after the other and all of them in the same order. It is found out
    by packing numbered codes: torch does not say it, and it differs between processors.
    """

    def __init__(self, device: torch.device, rows: int, columns: int) -> None:
        self.device, self.rows, self.columns = device, rows, columns
        numbers = torch.arange(rows * columns, device=device).view(rows, columns)
        digits = [halves(self.pack(numbers >> shift & 15).view(torch.uint8).flatten()).long() for shift in (0, 4, 8)]
        # Which place a code of a tile has.
        self.places = (digits[0] + 16 * digits[1] + 256 * digits[2]).argsort()

    def shape(self, rows: int, columns: int) -> tuple[int, ...]:
        """The shape of a packed weight [rows, columns]."""
        return (rows, columns // 2) if self.device.type == "cpu" else (rows // 8, columns // 128, 32, 4)

    def pack(self, codes: Tensor) -> Tensor:
        """Codes [rows, columns] in the kernel layout."""
        if self.device.type == "cpu":
            packed: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
        else:
            # This one has the first code of a pair in the upper half.
            pairs = (codes[:, 0::2] << 4 | codes[:, 1::2]).to(torch.uint8)
            packed = torch.ops.aten._convert_weight_to_int4pack(pairs, 8)
        return packed

    def unpack(self, packed: Tensor, columns: int) -> Tensor:
        """Codes [rows, columns] of the bytes of whole rows of tiles; undoes `pack`."""
        across = columns // self.columns
        tiles = halves(packed).view(-1, across, len(self.places))[..., self.places]
        return tiles.view(-1, across, self.rows, self.columns).transpose(1, 2).reshape(-1, columns)

    def is_right(self) -> bool:
        """Whether packing is undone, and whether the kernel multiplies in this order, on several tiles."""
        numbers = torch.arange(3 * self.rows * 256, device=self.device).view(-1, 256)
        codes = (numbers * 0x9E3779B1 >> 20 & 15).to(torch.uint8)
        packed = self.pack(codes)
        # Two groups; products with unit vectors are the columns, exactly.
        scales = torch.tensor([1.0, 4.0], device=self.device).bfloat16()[:, None].expand(2, len(codes))
        scales_and_zeros = torch.stack((scales, torch.zeros_like(scales)), dim=-1).contiguous()
        columns = (codes.float() - 8) * torch.tensor([1.0, 4.0], device=self.device).repeat_interleave(128)
        units = torch.eye(256, dtype=torch.bfloat16, device=self.device)
        return torch.equal(self.unpack(packed.view(torch.uint8).flatten(), 256), codes) and all(
            torch.equal(self.multiply(some, packed, scales_and_zeros, 128).float(), column)
            for some, column in zip(
                torch.split(units, MOST_TOKENS_OF_KERNEL), torch.split(columns.t(), MOST_TOKENS_OF_KERNEL), strict=True
            )
        )

    def multiplies(self, tokens: Tensor) -> bool:
        """Whether to use the kernel: it takes this dtype, and the tokens are few."""
        # Compiled, the one for CPU takes no other dtype either.
        takes_any = self.device.type == "cpu" and not torch.compiler.is_compiling()
        return (takes_any or tokens.dtype == torch.bfloat16) and tokens.shape[0] <= MOST_TOKENS_OF_KERNEL

    def multiply(self, tokens: Tensor, packed: Tensor, scales_and_zeros: Tensor, group_size: int) -> Tensor:
        """tokens @ weight.T by the kernel."""
        aten = torch.ops.aten
        kernel = aten._weight_int4pack_mm_for_cpu if self.device.type == "cpu" else aten._weight_int4pack_mm
        product: Tensor = kernel(tokens.contiguous(), packed, group_size, scales_and_zeros.to(tokens.dtype))
        return product


# Rows and columns of a tile. What fits processors with the widest registers comes first.
TILES = {"cpu": ((64, 32), (32, 32), (16, 32)), "cuda": ((8, 128),)}


@cache
def kernel_layout(device: torch.device) -> KernelLayout | None:
    """The kernel layout of a device, or None if there is no kernel whose layout is known, or a better one."""
    if device.type == "cuda" and (torch.version.hip is not None or torch.cuda.get_device_capability(device) < (8, 0)):
        return None
    if gpu_int4.has_int4_kernels(device):
        return None
    layouts = (KernelLayout(device, rows, columns) for rows, columns in TILES.get(device.type, ()))
    return next((layout for layout in layouts if layout.is_right()), None)
