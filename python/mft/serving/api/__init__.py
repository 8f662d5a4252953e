"""What clients speak to: connections, checks, the routes of OpenAI and vLLM, and their bodies."""
