"""Data: files, directories and the records in them. `write(path, text)` returns the path, `source(path)` opens it as
data.source, and `read(kind, ...)` reads a record of that kind.
"""

import json

from mft.config import DataConfig, TrainConfig
from mft.data.formats import read_example
from mft.data.mixing import mix_order
from mft.data.sources import open_source


def write(path, text):
    path.write_text(text)
    return path


def source(path, **keys):
    return open_source(DataConfig(source=str(path), **keys))


def read(kind, **row):
    return read_example(kind, row, "data.jsonl:1", templated=True)


TABLE = r"""
an empty line between data
    splits = source(write(tmp / "data.jsonl", '{"text": "a"}\n\n{"text": "b"}\n{"text": "c"}\n')).load().values()
    assert sorted(records.place(0).rpartition(":")[2] for records in splits) == ["1", "3", "4"]
    -> accepted: it is skipped, and counted in the numbers of lines
a table beside data
    write(tmp / "train.jsonl", '{"text": "a"}\n{"text": "b"}\n{"text": "c"}\n')
    write(tmp / "train.csv", "id,name\n1,x\n")
    assert sum(len(records.rows) for records in source(tmp).load().values()) == 3
    -> accepted: it is left aside, as a table about the others
an instruction without an input
    chat = read("instruction", instruction="Count to 2.", output="1 2")
    assert chat.messages[0] == {"role": "user", "content": "Count to 2."}
    -> accepted: the user says the instruction alone; so too where the input is empty or null
shares that leave nothing to train on
    DataConfig(validation_share=0.5, test_share=0.5)
    -> ValueError: validation_share | must leave examples to train on | got 0.5 | with test_share = 0.5
a share of a stream
    DataConfig(streaming=True, validation_share=0.2)
    -> ValueError: validation_share | must be left out with streaming, because max_eval_tokens says what is held out
        | got 0.2
a share in percent
    DataConfig(test_share=100)
    -> ValueError: test_share | must lie in [0, 1] | got 100.0
epochs of a stream
    TrainConfig(epochs=1).steps_for(None)
    -> ValueError: train.steps | must be given with data.streaming, because the length of an epoch is unknown
        | got train.epochs=1 | set train.steps, and train.epochs to null
a part of a stream
    source(write(tmp / "train.jsonl", '{"text": "a"}\n').parent, split="train[:10%]", streaming=True)
    -> ValueError: data.split | must be a whole split with data.streaming | got 'train[:10%]'
        | write that part into a file of its own
a zipped file that is none
    source(write(tmp / "data.jsonl.gz", '{"text": "a"}\n')).load()
    -> ValueError: data.jsonl.gz | must be a gzip file | Not a gzipped file
data that is misspelt
    write(tmp / "data.jsonl", "{}")
    source(tmp / "dta.jsonl")
    -> ValueError: data.source | must be data that exists | dta.jsonl' | did you mean /tmp/dir/data.jsonl?
data with a broken line
    source(write(tmp / "data.jsonl", '{"text": "a"}\n{"text": }\n')).load()
    -> ValueError: data.jsonl:2: broken JSON | must be one object per line | Expecting value at character 10
an array in a file of lines
    source(write(tmp / "data.jsonl", '[{"text": "a"}, {"text": "b"}]')).load()
    -> ValueError: data.jsonl:1 | must be one object per line | got an array | name a file of one array .json
lines in a file of an array
    source(write(tmp / "data.json", '{"text": "a"}\n{"text": "b"}\n')).load()
    -> ValueError: data.json:2 | must be one array | got a file with: Extra data
        | name a file of one object per line .jsonl
a chat among texts
    source(write(tmp / "data.jsonl", '{"text": "a"}\n{"text": "b"}\n{"messages": []}\n')).load()
    -> ValueError: data.jsonl:3 | must have text, as the first example has | got messages
        | put examples of another form into another file
pairs, some of them with a text
    pair = '"chosen": "a", "rejected": "b"'
    lines = [f'{{"prompt": "{i}", {pair}}}' for i in range(9)] + [f'{{"text": "c", {pair}}}']
    assert source(write(tmp / "data.jsonl", "\n".join(lines))).load()
    -> accepted: every one of them is a pair
data in latin 1
    (tmp / "data.jsonl").write_bytes('{"text": "a"}\n{"text": "é"}\n'.encode("latin-1"))
    source(tmp / "data.jsonl").load()
    -> ValueError: data.jsonl:2 | must be UTF-8 text | got 0xe9 at byte 24 of the file
        | convert it, if it is LATIN1 by iconv -f LATIN1 -t UTF-8
data that nest too deeply
    source(write(tmp / "data.jsonl", "[" * 10**5)).load()
    -> ValueError: data.jsonl:1 | JSON must nest a few levels deep | got one that is too deep to be read
        | examples need no more than messages
data of two types in one directory
    for name in ("a.jsonl", "a.parquet"):
        write(tmp / name, "")
    source(tmp)
    -> ValueError: data.source | must be a directory with .jsonl, .parquet or .csv files
        | .jsonl and .parquet, perhaps the same twice | name the directory of one
saved data that name a file elsewhere
    write(tmp / "state.json", '{"_data_files": [{"filename": "../../secret.arrow"}]}')
    source(tmp)
    -> ValueError: state.json | _data_files must be the names of files or directories next to it | ../../secret.arrow
data with a misspelt column
    source(write(tmp / "data.jsonl", '{"txt": "a"}\n')).load()
    -> ValueError: data.jsonl:1
        | data must have a column messages or conversations, columns prompt and completion, instruction and output or
        question and answer, or a column text | got txt | did you mean text?
data that cannot be split
    source(write(tmp / "data.jsonl", '{"text": "a"}\n' * 9)).load()
    -> ValueError: data.source | must have more than 2 different examples | got 1 | add examples, or give those splits
data in another format
    source(write(tmp / "data.xml", "<text>a</text>"))
    -> ValueError: data.source | must be a .json, .jsonl, .parquet or .csv file if it is a file | data.xml
        | convert it
an array of examples
    source(write(tmp / "data.json", json.dumps([{"text": f"Row {i}."} for i in range(9)]))).load()
    -> accepted: a JSON array is read whole
an object where examples should be
    source(write(tmp / "data.json", '{"data": [{"text": "a"}]}')).load()
    -> ValueError: data.json | must be an array of objects | got {'data': [{'text': 'a'}]}
        | put examples alone into the file
an array with something else in it
    source(write(tmp / "data.json", '[{"text": "a"}, "b"]')).load()
    -> ValueError: data.json item 1 | must be a JSON object | got 'b' | put examples alone into the file
a conversation of someone unknown
    read("conversations", conversations=[{"from": "humam", "value": "Hi"}, {"from": "gpt", "value": "Hello."}])
    -> ValueError: data.jsonl:1: conversations[0].from | must be one of human, user, gpt | got 'humam'
        | did you mean human?
an instruction without an output
    source(write(tmp / "data.jsonl", '{"instruction": "a", "input": "b"}\n')).load()
    -> ValueError: data.jsonl:1 | columns prompt and completion, instruction and output | got input, instruction
        | instruction needs its other half
a prompt of messages with a completion of text
    read("completion", prompt=[{"role": "user", "content": "Hi"}], completion="Hello.")
    -> ValueError: data.jsonl:1 | prompt and completion must both be strings or both lists of messages
        | got [{'role': 'user', 'content': 'Hi'}] (list) and 'Hello.' (str)
a message with a picture
    content = [{"type": "text", "text": "What is it?"}, {"type": "image_url", "image_url": {"url": "x.png"}}]
    read("messages", messages=[{"role": "user", "content": content}])
    -> ValueError: data.jsonl:1: messages[0].content[1] | must be {type: text, text: ...}, since models read text alone
        | got the type image_url
tools that are no list
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    read("messages", messages=turns, tools='"add"')
    -> ValueError: data.jsonl:1: tools | must be a list of objects, or such a list as JSON | got '"add"' (str)
a table with a comma too many
    source(write(tmp / "data.csv", 'prompt,completion\n"1, 2,",3\n1, 2,3\n')).load()
    -> ValueError: data.csv:3 | must have 2 values, as many as the header names | got 3
        | put quotes around one that has commas
a table with a quote that stays open
    source(write(tmp / "data.csv", 'text\n"a\nb\n')).load()
    -> ValueError: data.csv:2 | broken CSV | unexpected end of data
        | put quotes around what has commas, quotes or line ends, and write quotes in it twice
"""
