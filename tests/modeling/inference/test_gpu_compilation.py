"""The GPU kernels compiled ahead of time, on any machine: no spills, and few instructions for each weight.

`.ci/kernels` runs it. The interpreter proves results, but not that a kernel compiles.
"""

import os
import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="the kernels need Triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels cannot be compiled", allow_module_level=True)

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from modeling_mistral_large.inference import triton_kernels, triton_products
from modeling_mistral_large.inference.gpu_kernels import DOT_TILE, SMALL_INT4_TILE, VECTOR_TILE, WORDS, Tile

TOOLS = Path(triton.__path__[0], "backends", "nvidia", "bin")
POINTERS = {"bf16": "*bf16", "fp8": "*fp8e4nv", "fp8_bits": "*u8", "int4": "*i32"}
CAPABILITIES = [80, 89, 90]
# Most instructions of a thread of sm_90 for each of its weights. At 4.3 TB/s the issue slots of an H200 allow 15 for
# BF16, 7.7 for FP8 and 4.0 for int4.
MOST_INSTRUCTIONS = {"bf16 vector": 4.5, "fp8 vector": 3.5, "bf16 dot": 2.1, "fp8 dot": 4.6, "int4 dot": 2.4}


class Compiled:
    """Machine code of a kernel: bytes of stack, which spills need, and the instructions of its longest loop."""

    def __init__(
        self,
        kernel: Any,
        capability: int,
        types: dict[str, str],
        constants: dict[str, Any],
        folder: Path,
        warps: int = 4,
    ) -> None:
        names = kernel.arg_names
        source = ASTSource(
            fn=kernel,
            signature={name: types.get(name, "constexpr") for name in names},
            constexprs={(names.index(name),): value for name, value in constants.items()},
            # As at run time: pointers and row counts that are multiples of 16.
            attrs={
                (place,): [["tt.divisibility", 16]]
                for place, name in enumerate(names)
                if types.get(name, "").startswith("*") or name.startswith("rows_")
            },
        )
        code = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
        binary = folder / "kernel.cubin"
        binary.write_bytes(code.asm["cubin"])
        usage = self._run("cuobjdump", "-res-usage", binary)
        stack = re.search(r"STACK:(\d+)", usage)
        assert stack is not None, usage
        self.stack_bytes = int(stack[1])
        self.disassembly = self._run("nvdisasm", "-c", binary)
        self.instructions_of_loop = self._longest_loop(self.disassembly)

    def count(self, opcode: str) -> int:
        """Instructions whose name starts with this, all of them for an empty one."""
        return len(
            re.findall(rf"^\s*/\*[0-9a-f]+\*/\s+(?:@!?\w+ )?{re.escape(opcode)}\w*", self.disassembly, re.MULTILINE)
        )

    @staticmethod
    def _run(tool: str, *arguments: Any) -> str:
        return subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout

    @staticmethod
    def _longest_loop(disassembly: str) -> int:
        labels: dict[str, int] = {}
        count = longest = 0
        for line in map(str.strip, disassembly.splitlines()):
            if label := re.match(r"(\.L_x_\d+):", line):
                labels[label[1]] = count
            elif re.match(r"/\*[0-9a-f]+\*/\s", line):
                count += 1
                jump = re.search(r"BRA.*`\((\.L_x_\d+)\)", line)
                # Backwards: the label was met before.
                if jump and jump[1] in labels:
                    longest = max(longest, count - labels[jump[1]])
        return longest


def product_of(kind: str, tile: Tile, capability: int, columns: int, folder: Path) -> Compiled:
    scales = "*bf16" if kind in ("bf16", "int4") else "*fp32"
    inputs = "*bf16" if kind in ("bf16", "int4") else "*fp32"
    types = {
        "x_ptr": "*bf16",
        "xs_ptr": inputs,
        "part_ptr": "*fp32",
        "m": "i32",
        "rows_0": "i32",
        "rows_1": "i32",
        "rows_2": "i32",
    }
    for place in range(3):
        types |= {f"w_{place}": POINTERS[kind], f"s_{place}": scales}
    constants = {
        "COLUMNS": columns,
        "KIND": kind,
        "GROUP": 128 if kind == "int4" else 0,
        "VECTOR": tile.is_vector,
        "BLOCK_ROWS": tile.rows,
        "BLOCK_COLUMNS": tile.columns,
        "INPUTS": tile.inputs,
        "STAGES": tile.stages,
        "DOT": tl.bfloat16,
        "ASSEMBLY": True,
    }
    return Compiled(triton_products.product, capability, types, constants, folder, tile.warps)


TILES = [(kind, tile) for tiles in (VECTOR_TILE, DOT_TILE) for kind, tile in tiles.items()]
# For 9 to 16 sequences.
TILES += [(kind, replace(tile, inputs=16)) for kind, tile in DOT_TILE.items() if tile.inputs < 16]


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(("kind", "tile"), TILES, ids=lambda value: value if isinstance(value, str) else "")
def test_products(kind: str, tile: Tile, capability: int, tmp_path: Path) -> None:
    if kind == "fp8" and capability < 89:
        pytest.skip("the type came with 8.9; fp8_bits takes its place")
    if kind == "int4" and capability < 90:
        tile = replace(SMALL_INT4_TILE, inputs=tile.inputs)
    compiled = product_of(kind, tile, capability, 12288, tmp_path)
    assert compiled.stack_bytes == 0
    most = MOST_INSTRUCTIONS.get(f"{kind} {'vector' if tile.is_vector else 'dot'}")
    if capability == 90 and most is not None:
        weights_of_thread = tile.rows * tile.columns / (32 * tile.warps)
        assert compiled.instructions_of_loop / weights_of_thread <= most


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_everything_between_products(capability: int, tmp_path: Path) -> None:
    """At the geometry of 2407, with the order of int4 and several splits."""
    geometry = {"HEADS": 96, "KV_HEADS": 8, "D": 128}
    rows = {"m": "i32"}
    slots = {"length_ptr": "*i32", "start_ptr": "*i32", "room": "i32"}
    states = {"q_ptr": "*bf16", "k_ptr": "*bf16", "v_ptr": "*bf16", "ks_ptr": "*bf16", "vs_ptr": "*bf16"}
    stored = {**states, "k_ptr": "*u8", "v_ptr": "*u8"}
    read = stored if capability < 89 else {**states, "k_ptr": "*fp8e4nv", "v_ptr": "*fp8e4nv"}
    stream = {"stream_ptr": "*bf16", "gain_ptr": "*bf16", "y_ptr": "*bf16", "scale_ptr": "*fp32", "eps": "fp32"}
    rotation = {"part_ptr": "*fp32", "cos_ptr": "*bf16", "sin_ptr": "*bf16", **slots, **rows}
    tiles = {"GROUP_SIDE": 16, "BLOCK": 64, "SPLITS": 32, "STAGES": 2, "QUERIES": 1, "DOT": tl.bfloat16}
    left = {"part_ptr": "*fp32", "stat_ptr": "*fp32"}
    cases: list[tuple[Any, dict[str, str], dict[str, Any], int]] = [
        *(
            (
                triton_kernels.add_and_norm,
                {**stream, "part_ptr": "*fp32", **rows},
                {"COLUMNS": 12288, "BLOCK": 16384, "SPLITS": 3, "GROUP": 0 if is_fp8 else 128, "FP8": is_fp8},
                16,
            )
            for is_fp8 in (False, True)
        ),
        (
            triton_kernels.round_rows,
            {"x_ptr": "*bf16", "y_ptr": "*bf16", "scale_ptr": "*fp32"},
            {"COLUMNS": 28672, "BLOCK": 32768},
            16,
        ),
        *(
            (
                triton_kernels.rotate_and_store,
                {**rotation, **(stored if is_fp8 else states)},
                {**geometry, "SPLITS": 3, "QUERIES": 1, "FP8": is_fp8},
                1,
            )
            for is_fp8 in (False, True)
        ),
        *(
            (
                triton_kernels.attention,
                {**(read if is_fp8 else states), **left, **slots, "scale": "fp32"},
                {**geometry, **tiles, "FP8": is_fp8, "BITS": is_fp8 and capability < 89},
                4,
            )
            for is_fp8 in (False, True)
        ),
        (
            triton_kernels.join_attention,
            {**left, "y_ptr": "*bf16"},
            {"HEADS": 96, "D": 128, "SPLITS": 32, "GROUP": 128},
            4,
        ),
        (
            triton_kernels.silu_and_multiply,
            {"part_ptr": "*fp32", "y_ptr": "*bf16", **rows},
            {"COLUMNS": 28672, "BLOCK": 1024, "SPLITS": 3, "GROUP": 128},
            4,
        ),
    ]
    for kernel, types, constants, warps in cases:
        assert Compiled(kernel, capability, types, constants, tmp_path, warps).stack_bytes == 0, kernel.__name__


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_dequantization(capability: int, tmp_path: Path) -> None:
    """Words and values in whole vectors of 16 bytes, and fewer instructions than memory leaves time for."""
    types = {"w_ptr": "*i32", "s_ptr": "*bf16", "y_ptr": "*bf16", "rows": "i32"}
    constants = {"COLUMNS": 12288, "GROUP": 128, "BLOCK_ROWS": 4, "BLOCK_WORDS": WORDS}
    compiled = Compiled(triton_products.dequantize, capability, types, constants, tmp_path)
    assert compiled.stack_bytes == 0
    weights_of_thread = 4 * WORDS * 8 / 128
    # 2.5 bytes a weight at 4.3 TB/s leave an H200 19 issue slots for each.
    assert compiled.count("") / weights_of_thread <= 11
    assert compiled.count("STG.E.128") == weights_of_thread / 8
