"""A server: jobs in a queue, the APIs of OpenAI and AUTOMATIC1111, and a page (docs/serve.md)."""
