"""The real vLLM inside TRL's GRPOTrainer: it answers with the masks of each step."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from real_base import SETTINGS, missing

pytest.importorskip("trl")
pytest.importorskip("peft")
pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())
NEAR = 1e-3  # of a token's log-probability in fp32: vLLM's against the trainer's


def trained(kind, directory):
    """Return (what real_trl.py prints as JSON, the lines of the stream)."""
    command = [sys.executable, str(Path(__file__).with_name("real_trl.py")), kind, str(directory)]
    done = subprocess.run(command, env={**os.environ, **SETTINGS}, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    lines = done.stdout.splitlines()
    return json.loads([line for line in lines if line.startswith("{")][-1]), [line for line in lines if "bytes" in line]


@pytest.mark.parametrize("kind", ["peft", "mask_model"])
def test_vllm_has_the_masks_of_each_step(tmp_path, kind):
    found, lines = trained(kind, tmp_path)
    print(found, lines)
    assert len(found["difference"]) == 3
    assert max(found["difference"]) < NEAR
    assert found["differing"][0] == 0 < found["differing"][1]
    assert [line[: line.index(":")] for line in lines] == [f"policy, step {number}" for number in range(4)]


def test_old_masks_would_be_noticed(tmp_path):
    found, lines = trained("stale", tmp_path)
    assert len(lines) == 1
    assert found["difference"][0] < NEAR < max(found["difference"])
    assert found["differing"][0] > 0
