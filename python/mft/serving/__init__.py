"""mft serve: the masks of many tasks on one base, behind OpenAI's HTTP interface."""
