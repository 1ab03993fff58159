"""What notebooks show: tables whose every text is escaped."""

from dataclasses import replace
from pathlib import Path

import pytest

from mistral_large_cli.demo import assemble_demo_checkpoint
from mistral_large_conversion import inspect_checkpoint
from mistral_large_conversion.notebook import html_table
from mistral_large_conversion.sharding import parse_devices, plan_sharding
from modeling_mistral_large import MistralLargeConfig

SCRIPT = "<script>alert('1')</script>"
ESCAPED = "&lt;script&gt;alert(&#x27;1&#x27;)&lt;/script&gt;"


def test_every_cell_is_escaped() -> None:
    expected = f"<table><tr><th>{ESCAPED}</th></tr><tr><td>{ESCAPED}</td></tr></table>"
    assert html_table([(SCRIPT,)], head=(SCRIPT,)) == expected


def test_an_inspection_is_a_table_of_what_it_says(tmp_path: Path) -> None:
    inspection = inspect_checkpoint(assemble_demo_checkpoint(tmp_path))
    shown = inspection._repr_html_()
    for name, value in (("n_layers", "3"), ("parameters", "4,440,512"), ("tokenizer", "tokenizer.model.v3")):
        assert f"<tr><td>{name}</td><td>{value}</td></tr>" in shown
    assert "problem" not in shown
    shown = replace(inspection, name=SCRIPT, problems=(SCRIPT,))._repr_html_()
    assert shown.count(ESCAPED) == 2
    assert SCRIPT not in shown


@pytest.mark.parametrize(("devices", "said"), [("4x80GB", "fits, at most"), ("1x80GB", "GiB short")])
def test_a_plan_is_a_table_of_its_devices(devices: str, said: str) -> None:
    plan = plan_sharding(MistralLargeConfig(), parse_devices(devices), context=4096)[0]
    shown = plan._repr_html_()
    assert said in shown
    assert shown.count("<tr>") == 1 + len(plan.loads)
    named = replace(plan, loads=(replace(plan.loads[0], device=replace(plan.loads[0].device, name=SCRIPT)),))
    assert ESCAPED in named._repr_html_()
