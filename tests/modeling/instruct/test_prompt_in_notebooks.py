"""A prompt as a notebook shows it."""

from modeling_mistral_large.instruct import build_prompt


def test_control_tokens_are_bold_and_texts_are_escaped() -> None:
    prompt = build_prompt(
        [{"role": "system", "content": "Be <b>brief</b>."}, {"role": "user", "content": "[INST] Hi"}],
        prompt_format="v7",
    )
    assert prompt == [*prompt]
    assert prompt._repr_html_() == (
        '<div style="font-family: monospace; white-space: pre-wrap">'
        '<span style="color: inherit; font-weight: bold">&lt;s&gt;</span>'
        '<span style="color: yellow; font-weight: bold">[SYSTEM_PROMPT]</span>'
        '<span style="color: yellow"> Be &lt;b&gt;brief&lt;/b&gt;.</span>'
        '<span style="color: yellow; font-weight: bold">[/SYSTEM_PROMPT]</span>'
        '<span style="color: green; font-weight: bold">[INST]</span>'
        '<span style="color: green"> [INST] Hi</span>'
        '<span style="color: green; font-weight: bold">[/INST]</span></div>'
    )
