"""Chats from which tests of the data make their rows, and a row's tokens."""

from mft.data.sources import Records
from mft.data.tokenization import open_documents

MARKED_CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>"
    "{% endif %}\n{% endfor %}"
)


def chat(*contents, system=None):
    turns = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return {"messages": ([{"role": "system", "content": system}] if system else []) + turns}


def chats(count=40):
    return [chat(f"What is {i} + 1?", f"It is {i + 1}.") for i in range(count)]


def encoded(row, tokenizer, assistant_only=True):
    """Return the only row of a source as (ids, labels)."""
    records = Records([row], lambda i: f"row {i}", sorted(row), [0])
    documents = open_documents(records, tokenizer, assistant_only=assistant_only)
    ((_, example),) = documents.encoded([0])
    return example.ids.tolist(), example.labels.tolist()
