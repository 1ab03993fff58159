"""The chat page: static files, and the routes that it needs next to OpenAI's API."""

from modeling_mistral_large.serving.page.routes import page_routes

__all__ = ["page_routes"]
