"""The HTTP interface: connections, checks, the routes of OpenAI and vLLM, and their bodies."""
