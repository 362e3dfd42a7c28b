"""Serving: the engine that measured, behind OpenAI's protocol, with a chat page and a terminal chat."""
