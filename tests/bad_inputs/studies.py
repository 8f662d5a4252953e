"""Studies: what mft compare and mft ablate refuse in arms, grids and budgets, and from processes that join."""

import dataclasses
import errno
import os
from pathlib import Path

from bad_inputs.environment import fails
from mft.files.atomic import NotWritten, publish, write_whole
from mft.files.yaml_file import dump_yaml
from mft_study.ablate import derive
from mft_study.arms.kinds import make_arm
from mft_study.cli.compare import run_compare
from mft_study.load import load_study, study_values
from mft_study.shared import on_ray
from mft_study.shared.alike import read_noted
from mft_study.shared.leases import Leases, Pace, open_leases
from mft_study.store import Store, fine_tunes_in, open_store
from mft_study.study_run import run_study

PACE = Pace(beat=0.05, expiry=0.2, look=0.05)

TABLE = r"""
a bound of no epochs
    dataclasses.replace(load_study("small"), max_epochs=0)
    -> ValueError: max_epochs | must be positive | got 0.0
fewer further settings than none
    dataclasses.replace(load_study("small"), extensions=-1)
    -> ValueError: extensions | must be at least 0 | got -1
a mask that the study does not have
    derive(load_study("small"), "layers", masks=["MTF"])
    -> ValueError: --arm | must be one of MFT (paper), MFT | got 'MTF' | did you mean MFT
an arm in codes that is made of one without codes
    study = load_study("small")
    dataclasses.replace(study, arms=study.arms | {"MFT in NF4": make_arm("in_codes", of="MFT")})
    -> ValueError: arms.MFT in NF4.of | must name an arm that begins at a quantized one | got MFT
fine tunes of what is no study
    fine_tunes_in("runs/nowhere", load_study("small"))
    -> ValueError: --fine-tunes-of | must be the output_dir of a study | got runs/nowhere without a study.yaml
an ablation of keep ratios of a mask that has none
    derive(load_study("small"), "ratio", masks=["MFT"])
    -> ValueError: arms | must hold a mask without a threshold or a budget to be ablated by ratio | got MFT
an ablation of data of a fine tune with one number of epochs
    study = load_study("moe")
    assert study.arms["full fine-tune"].epochs == [4]
    assert derive(study, "data").arms["full fine-tune"].epochs == [4, 8]
    -> accepted: each share's fine-tune may choose twice as many epochs too, and more while it wants them
# processes that join
a study that is to be joined and deleted
    open_store(load_study("small"), "runs/small", joins=True, overwrite=True).__enter__()
    -> ValueError: --join | must not come with --overwrite, which deletes what others work on | got runs/small
workers on what there is not
    run_compare(load_study("small"), overwrite=False, on="rya")
    -> ValueError: --on | must be one of | got 'rya' | did you mean ray
processes that join with workers of a cluster
    run_compare(load_study("small"), overwrite=False, joins=True, on="ray")
    -> ValueError: --join | must not come with --on, because its workers are in one cluster | got ray
processes that join with another study's fine tunes
    run_compare(load_study("small"), overwrite=False, joins=True, fine_tunes_of=Path("runs/other"))
    -> ValueError: --fine-tunes-of | must not come with --join | got runs/other | begin the study in a single process
workers on ray without ray
    patch.setattr(on_ray, "find_spec", lambda name: None)
    run_study(load_study("small"), tmp / "run", console=None, on="ray")
    -> ValueError: --on ray | must find the package ray | got none
        | pip install --no-build-isolation -e '.[ray]' in the clone
a result on a disk without hard links
    patch.setattr(os, "link", fails(errno.EPERM))
    publish(tmp / "result.json", "{}")
    -> NotWritten: result.json | must be on a disk with hard links | got Operation not permitted
        | name a directory on another disk
a lease on a full disk
    patch.setattr(os, "write", fails(errno.ENOSPC))
    Leases(tmp).take("unit")
    -> NotWritten: unit.1 | could not be written | No space left on device | see that the disk has room
a directory in place of a lease
    (tmp / "leases" / "unit.1").mkdir(parents=True)
    Leases(tmp).take("unit")
    -> NotWritten: unit.1 | must be a lease that can be read | Is a directory
        | remove it if no process of this study runs
one that works alone where another joined
    with open_leases(tmp, joins=True, pace=PACE), open_leases(tmp, joins=False, pace=PACE):
        pass
    -> RuntimeError: output_dir | is in use by process ... on ..., one of several | one of several | pass --join too
a file in place of the folder of leases
    (tmp / "leases").write_text("")
    Leases(tmp).take("unit")
    -> NotWritten: leases | must be a folder of leases that can be read | Not a directory
        | remove it if no process of this study runs
one that joins in the directory of a study with another batch size
    write_whole(tmp / "study.yaml", dump_yaml(study_values(load_study("small", ["stage.batch_size=7"]))))
    open_store(load_study("small"), tmp, joins=True).__enter__()
    -> ValueError: study.yaml | must match the given configuration | changed: stage.batch_size: 7 -> 8
        | Name another output_dir
one that joins where study yaml holds a list
    write_whole(tmp / "study.yaml", "- 1")
    open_store(load_study("small"), tmp, joins=True).__enter__()
    -> ValueError: study.yaml | must declare a study | got other YAML | name another output_dir
a list in place of what all processes must have alike
    write_whole(tmp / "alike.json", "[]")
    read_noted(tmp / "alike.json")
    -> ValueError: alike.json | expected an object | got list
a number in place of the versions that all processes must have
    write_whole(tmp / "alike.json", '{"versions": 3}')
    read_noted(tmp / "alike.json")
    -> ValueError: alike.json | versions must be an object | got 3 | delete the file if no process of this study runs
a result with other values
    write_whole(tmp / "units" / "code" / "MFT" / "0.json", "{}")
    Store(load_study("small"), tmp).outcomes()
    -> ValueError: 0.json | must be the JSON that was written | got KeyError('measured') | delete it to run it again
a result whose numbers were changed
    write_whole(tmp / "units" / "code" / "MFT" / "0.json", '{"measured": null, "checksum": "another"}')
    Store(load_study("small"), tmp).outcomes()
    -> ValueError: 0.json | must be the JSON that was written | got another unit's, or changed values
        | delete it to run it again
a number in place of what test has seen
    write_whole(tmp / "test" / "openings.json", "3")
    Store(load_study("small"), tmp).open_test([], {})
    -> ValueError: openings.json | must be the JSON that was written | got 3 | delete it to run it again
a lease with rubbish in it
    (tmp / "leases").mkdir()
    (tmp / "leases" / "unit.1").write_bytes(b"rubbish")
    said = []
    with Leases(tmp, said.append, PACE) as leases, leases.holding("unit"):
        assert "must say who holds it, got b'rubbish'" in said[0]
    -> accepted: it is told, and taken over once it has not changed for so long
"""
