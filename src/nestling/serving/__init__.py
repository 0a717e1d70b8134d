"""The service: an OpenAI-compatible API, a page, and the store of what people say of the replies."""
