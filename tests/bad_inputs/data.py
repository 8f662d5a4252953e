"""Data: files, directories and the records in them."""

from mft.config import DataConfig, TrainConfig
from mft.data.formats import read_example
from mft.data.mixing import mix_order
from mft.data.sources import of_source, open_source

from .registry import accepted, refused


def write(path, text):
    path.write_text(text)
    return path


@accepted("it is skipped, and counted in the numbers of lines")
def an_empty_line_between_data(tmp):
    lines = '{"text": "a"}\n\n{"text": "b"}\n{"text": "c"}\n'
    splits = open_source(DataConfig(source=str(write(tmp / "data.jsonl", lines)))).load().values()
    assert sorted(records.place(0).rpartition(":")[2] for records in splits) == ["1", "3", "4"]


@accepted("it is left aside, as a table about the others")
def a_table_beside_data(tmp):
    write(tmp / "train.jsonl", '{"text": "a"}\n{"text": "b"}\n{"text": "c"}\n')
    write(tmp / "train.csv", "id,name\n1,x\n")
    assert sum(len(records.rows) for records in open_source(DataConfig(source=str(tmp))).load().values()) == 3


@accepted("the user says the instruction alone; so too where the input is empty or null")
def an_instruction_without_an_input():
    chat = read_example("instruction", {"instruction": "Count to 2.", "output": "1 2"}, "data.jsonl:1", templated=True)
    assert chat.messages[0] == {"role": "user", "content": "Count to 2."}


@refused(
    ValueError,
    where="sources.chats.weight",
    got="got 0.0",
    rule="must be positive",
)
def a_source_without_weight():
    DataConfig(sources={"chats": {"source": "chats.jsonl", "weight": 0}})


@refused(
    ValueError,
    where="sources.chats",
    got="'wieght'",
    rule="unknown key",
    remedy="did you mean weight?",
)
def a_source_with_a_misspelt_key():
    DataConfig(sources={"chats": {"source": "chats.jsonl", "wieght": 2}})


@refused(
    ValueError,
    where="data.sources.chats",
    got="got an empty train split",
    rule="must hold examples",
)
def a_source_of_several_that_is_empty(tmp):
    sources = {"chats": {"source": str(write(tmp / "chats.jsonl", ""))}, "code": {"source": "stdlib"}}
    config = DataConfig(sources=sources)
    with of_source("chats"):
        open_source(config).parts["chats"].load()


@refused(
    ValueError,
    where="data.stopping_strategy",
    got="got about 2000000 rows",
    rule="must not be all_exhausted where that repeats 10100 rows 100 times",
    remedy="set first_exhausted or data.max_train_tokens, or other weights",
)
def a_weight_by_which_a_source_would_be_repeated_without_end():
    mix_order([10000, 100], [1, 199], "all_exhausted", None)


@refused(
    ValueError,
    where="train.steps",
    got="got train.epochs=1",
    rule="must be given with data.streaming, where nobody knows how long an epoch is",
    remedy="set train.steps, and train.epochs to null",
)
def epochs_of_a_stream():
    TrainConfig(epochs=1).steps_for(None)


@refused(
    ValueError,
    where="data.split",
    got="got 'train[:10%]'",
    rule="must be a whole split with data.streaming",
    remedy="write that part into a file of its own",
)
def a_part_of_a_stream(tmp):
    write(tmp / "train.jsonl", '{"text": "a"}\n')
    open_source(DataConfig(source=str(tmp), split="train[:10%]", streaming=True))


@refused(
    ValueError,
    where="data.jsonl.gz",
    got="Not a gzipped file",
    rule="must be a gzip file",
)
def a_zipped_file_that_is_none(tmp):
    open_source(DataConfig(source=str(write(tmp / "data.jsonl.gz", '{"text": "a"}\n')))).load()


@refused(
    ValueError,
    where="data.source",
    got="dta.jsonl'",
    rule="must be data that exists",
    remedy="did you mean /tmp/dir/data.jsonl?",
)
def data_that_is_misspelt(tmp):
    write(tmp / "data.jsonl", "{}")
    open_source(DataConfig(source=str(tmp / "dta.jsonl")))


@refused(ValueError, where="data.jsonl:2", got="Expecting value", rule="must be one object a line")
def data_with_a_broken_line(tmp):
    open_source(DataConfig(source=str(write(tmp / "data.jsonl", '{"text": "a"}\n{"text": }\n')))).load()


@refused(
    ValueError,
    where="data.jsonl:2",
    got="got 0xe9 at byte 24 of the file",
    rule="must be UTF-8 text",
    remedy="convert it, if it is LATIN1 by iconv -f LATIN1 -t UTF-8",
)
def data_in_latin_1(tmp):
    (tmp / "data.jsonl").write_bytes('{"text": "a"}\n{"text": "é"}\n'.encode("latin-1"))
    open_source(DataConfig(source=str(tmp / "data.jsonl"))).load()


@refused(
    ValueError,
    where="data.jsonl:1",
    got="got one that is too deep to be read",
    rule="JSON must nest a few levels deep",
    remedy="examples need no more than messages",
)
def data_that_nest_too_deeply(tmp):
    open_source(DataConfig(source=str(write(tmp / "data.jsonl", "[" * 10**5)))).load()


@refused(
    ValueError,
    where="data.source",
    got=".jsonl and .parquet, perhaps the same twice",
    rule="must be a directory with .jsonl, .parquet or .csv files",
    remedy="name the directory of one",
)
def data_of_two_types_in_one_directory(tmp):
    for name in ("a.jsonl", "a.parquet"):
        write(tmp / name, "")
    open_source(DataConfig(source=str(tmp)))


@refused(
    ValueError,
    where="state.json",
    got="../../secret.arrow",
    rule="_data_files must be the names of what lies beside it",
)
def saved_data_that_name_a_file_elsewhere(tmp):
    write(tmp / "state.json", '{"_data_files": [{"filename": "../../secret.arrow"}]}')
    open_source(DataConfig(source=str(tmp)))


@refused(
    ValueError,
    where="data.jsonl:1",
    got="got txt",
    rule="data must have a column messages or conversations, columns prompt and completion, instruction and output or "
    "question and answer, or a column text",
    remedy="did you mean text?",
)
def data_with_a_misspelt_column(tmp):
    open_source(DataConfig(source=str(write(tmp / "data.jsonl", '{"txt": "a"}\n')))).load()


@refused(
    ValueError,
    where="data.source",
    got="got 1",
    rule="must have more than 2 different examples",
    remedy="add examples, or give those splits",
)
def data_that_cannot_be_split(tmp):
    open_source(DataConfig(source=str(write(tmp / "data.jsonl", '{"text": "a"}\n' * 9)))).load()


@refused(
    ValueError,
    where="data.source",
    got="data.json",
    rule="must be a .jsonl, .parquet or .csv file",
    remedy="convert it, for JSONL to one JSON object a line",
)
def data_in_another_format(tmp):
    open_source(DataConfig(source=str(write(tmp / "data.json", '[{"text": "a"}]'))))


@refused(
    ValueError,
    where="data.jsonl:1: conversations[0].from",
    got="got 'humam'",
    rule="must be one of human, user, gpt",
    remedy="did you mean human?",
)
def a_conversation_of_someone_unknown():
    turns = [{"from": "humam", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]
    read_example("conversations", {"conversations": turns}, "data.jsonl:1", templated=True)


@refused(
    ValueError,
    where="data.jsonl:1",
    got="got input, instruction",
    rule="columns prompt and completion, instruction and output",
    remedy="instruction needs its other half",
)
def an_instruction_without_an_output(tmp):
    open_source(DataConfig(source=str(write(tmp / "data.jsonl", '{"instruction": "a", "input": "b"}\n')))).load()


@refused(
    ValueError,
    where="data.jsonl:1",
    got="got [{'role': 'user', 'content': 'Hi'}] (list) and 'Hello.' (str)",
    rule="prompt and completion must both be strings or both lists of messages",
)
def a_prompt_of_messages_with_a_completion_of_text():
    row = {"prompt": [{"role": "user", "content": "Hi"}], "completion": "Hello."}
    read_example("completion", row, "data.jsonl:1", templated=True)


@refused(
    ValueError,
    where="data.jsonl:1: messages[0].content[1]",
    got="got the type image_url",
    rule="must be {type: text, text: ...}, since models read text alone",
)
def a_message_with_a_picture():
    content = [{"type": "text", "text": "What is it?"}, {"type": "image_url", "image_url": {"url": "x.png"}}]
    read_example("messages", {"messages": [{"role": "user", "content": content}]}, "data.jsonl:1", templated=True)


@refused(
    ValueError,
    where="data.jsonl:1: tools",
    got="""got '"add"' (str)""",
    rule="must be a list of objects, or one as JSON",
)
def tools_that_are_no_list():
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    read_example("messages", {"messages": turns, "tools": '"add"'}, "data.jsonl:1", templated=True)


@refused(
    ValueError,
    where="data.csv:3",
    got="got 3",
    rule="must have 2 values, as many as the header names",
    remedy="put quotes around one that has commas",
)
def a_table_with_a_comma_too_many(tmp):
    lines = 'prompt,completion\n"1, 2,",3\n1, 2,3\n'
    open_source(DataConfig(source=str(write(tmp / "data.csv", lines)))).load()


@refused(
    ValueError,
    where="data.csv:2",
    got="unexpected end of data",
    rule="broken CSV",
    remedy="put quotes around what has commas, quotes or line ends, and write quotes in it twice",
)
def a_table_with_a_quote_that_stays_open(tmp):
    open_source(DataConfig(source=str(write(tmp / "data.csv", 'text\n"a\nb\n')))).load()
