"""Chats that tests of the data make their rows of."""


def chat(*contents, system=None):
    turns = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return {"messages": ([{"role": "system", "content": system}] if system else []) + turns}


def chats(count=40):
    return [chat(f"What is {i} + 1?", f"It is {i + 1}.") for i in range(count)]
