"""The chat template and the response template that travel with every converted checkpoint."""

import re
from importlib.resources import files

from modeling_mistral_large.chat_templates.response_template import RESPONSE_TEMPLATE

__all__ = ["CHAT_TEMPLATE", "PLAIN_CHAT_TEMPLATE", "RESPONSE_TEMPLATE"]

CHAT_TEMPLATE: str = files(__name__).joinpath("mistral_large_2407.jinja").read_text(encoding="utf-8")

# For a jinja2 without transformers' `generation` tag, which marks what the assistant says and renders nothing.
PLAIN_CHAT_TEMPLATE: str = re.sub(r"\{%- (end)?generation -%\}", "", CHAT_TEMPLATE)
