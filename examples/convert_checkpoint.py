"""Convert a consolidated checkpoint from Python, and back: first the plan, then the bytes.

Run `python examples/convert_checkpoint.py [SOURCE DESTINATION]`.

Without arguments it converts the demo checkpoint into a folder that is removed at the end.
"""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from mistral_large_cli.demo import assemble_demo_checkpoint
from mistral_large_conversion import convert_checkpoint, plan_conversion

with TemporaryDirectory() as folder:
    if len(sys.argv) == 3:
        source, destination = Path(sys.argv[1]), Path(sys.argv[2])
    else:
        source, destination = assemble_demo_checkpoint(Path(folder, "demo")), Path(folder, "demo-hf")

    plan = plan_conversion(source)
    print(f"{sum(len(file.outputs) for file in plan.files)} tensors of {plan.dtype}, {plan.tensor_bytes:,} bytes")
    for file in plan.files:
        print(f"{file.name}: {len(file.outputs)} tensors, {file.size:,} bytes")

    written: list[int] = []
    convert_checkpoint(source, destination, progress=written.append)
    print(f"{sum(written):,} bytes written in {len(written)} steps; {destination.name} now holds:")
    for path in sorted(destination.iterdir()):
        print(f"  {path.name}")

    # The way back has the bits of the source again.
    back = destination.with_name(f"{destination.name}-back")
    convert_checkpoint(destination, back, to="consolidated")
    print(f"{back.name} holds the vendor's layout again: {', '.join(sorted(path.name for path in back.iterdir()))}")
