"""The queue in which keys take turns."""

from collections import deque
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mft.serving.batch.fair_queue import FairQueue


def queue_of(names):
    """Return (a queue, {name: generation}); the first letter of a name is its key."""
    queue, made = FairQueue(), {name: SimpleNamespace(key=name[0], name=name) for name in names.split()}
    for each in made.values():
        queue.append(each)
    return queue, made


def drained(queue):
    return " ".join(queue.popleft().name for _ in range(len(queue)))


def test_keys_take_turns_and_within_a_key_the_first_comes_first():
    queue, made = queue_of("a1 a2 a3 a4 b1 b2 c1")
    assert " ".join(each.name for each in queue) == "a1 b1 c1 a2 b2 a3 a4"
    assert (queue.popleft(), queue.peek()) == (made["a1"], made["b1"])
    queue.append(SimpleNamespace(key="d", name="d1"))
    assert drained(queue) == "b1 c1 a2 d1 b2 a3 a4"
    with pytest.raises(IndexError):
        queue.peek()


def test_one_that_gave_its_place_back_is_the_next_and_one_that_leaves_is_not():
    queue, made = queue_of("a1 a2 b1 b2")
    queue.popleft()
    queue.appendleft(made["a1"])
    assert queue.peek() is made["a1"]
    queue.remove(made["b1"])
    assert (made["b1"] in queue, made["b2"] in queue, len(queue)) == (False, True, 3)
    assert drained(queue) == "a1 b2 a2"
    assert made["a1"] not in queue


def test_each_key_that_waits_has_an_equal_share():
    queue, _ = queue_of("a1 a2 a3")
    assert [queue.share(key, 3) for key in "ab"] == [(3, 3), (2, 0)]
    assert (FairQueue().share("a", 0), queue.share("b", 0)) == ((0, 0), (0, 0))


@given(st.lists(st.sampled_from(["a", "b", "c", "left", "pop", "remove"]), max_size=60))
def test_whatever_happens_a_key_keeps_its_order_and_iteration_that_of_popleft(actions):
    queue, kept, last = FairQueue(), {key: deque() for key in "abc"}, None
    for number, action in enumerate(actions):
        if action in kept:
            kept[action].append(SimpleNamespace(key=action, name=number))
            queue.append(kept[action][-1])
        elif action == "left" and last is not None:
            queue.appendleft(last)
            kept[last.key].appendleft(last)
            last = None
        elif action == "remove" and len(queue):
            gone = list(queue)[-1]
            queue.remove(gone)
            kept[gone.key].remove(gone)
        elif action == "pop" and len(queue):
            order, last = list(queue), queue.popleft()
            assert last is order[0] is kept[last.key].popleft()
            assert list(queue) == order[1:]
        assert len(queue) == sum(map(len, kept.values()))
