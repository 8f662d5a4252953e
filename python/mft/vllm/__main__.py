"""python -m mft.vllm: see serve.py."""

import sys

from mft.vllm.serve import main

if __name__ == "__main__":
    main(sys.argv[1:])
