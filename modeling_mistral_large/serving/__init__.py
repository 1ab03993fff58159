"""The server without vLLM: OpenAI's API on a batching engine of this package."""
