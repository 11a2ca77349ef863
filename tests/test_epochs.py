"""The order of an epoch: a function of seed, epoch and items; dealt out to processes, and resumed at any batch."""

import hashlib
import json
import random
from collections import Counter
from itertools import chain

import pytest
import torch

from dataset.epochs import Bucket, ItemKey, Position, epoch_batches, share, stable_number


def bucket(size, batch_size=2, dataset=0, name="im_{}_0064x0064_fp.safetensors", repeats=1):
    keys = [ItemKey(dataset=dataset, name=name.format(i), repeat=r) for i in range(size) for r in range(repeats)]
    return Bucket(keys=tuple(keys), batch_size=batch_size)


BUCKETS = (bucket(5), bucket(4, name="高い_{}"), bucket(3, batch_size=3, dataset=1, repeats=2))
NUM_BATCHES = 3 + 2 + 2


def names(batches):
    return [[key.name for key in batch] for batch in batches]


def test_an_epoch_shows_every_item_once():
    batches = epoch_batches(BUCKETS, seed=1, epoch=0)
    assert Counter(chain.from_iterable(batches)) == Counter(chain.from_iterable(b.keys for b in BUCKETS))


def test_a_batch_is_of_one_bucket_and_only_a_buckets_last_is_smaller():
    batches = epoch_batches(BUCKETS, seed=1, epoch=0)
    assert len(batches) == NUM_BATCHES == sum(b.num_batches for b in BUCKETS)
    for one in BUCKETS:
        mine = [batch for batch in batches if set(batch) & set(one.keys)]
        assert all(set(batch) <= set(one.keys) for batch in mine)
        full, rest = divmod(len(one.keys), one.batch_size)
        assert sorted(map(len, mine)) == sorted([one.batch_size] * full + [rest] * (rest > 0))


def test_every_epoch_and_seed_has_its_own_order_from_the_first_on():
    orders = [epoch_batches([bucket(20)], seed=seed, epoch=epoch) for seed in range(3) for epoch in range(3)]
    in_file_order = tuple(bucket(20).keys[i : i + 2] for i in range(0, 20, 2))
    assert len({*orders, in_file_order}) == 10


def test_items_change_their_companions_and_batches_their_places():
    firsts = {frozenset(epoch_batches([bucket(6)], seed=0, epoch=e)[0]) for e in range(60)}
    assert len(firsts) == 15  # every pair out of six


def test_places_are_uniform():
    counts = Counter(epoch_batches([bucket(4, batch_size=1)], seed=7, epoch=e)[0][0] for e in range(4000))
    assert all(abs(count - 1000) < 150 for count in counts.values()) and len(counts) == 4  # over five sigma


def test_order_is_the_same_in_any_process_and_version():
    batches = epoch_batches([bucket(3, name="{}"), bucket(2, dataset=1, name="日本_{}")], seed=42, epoch=1)
    assert names(batches) == [["0", "1"], ["日本_1", "日本_0"], ["2"]]


def test_order_is_what_the_hashes_say():
    def digest(kind, key):
        text = json.dumps([kind, 5, 2, key.dataset, key.name, key.repeat])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    keys = sorted(bucket(9).keys, key=lambda key: digest("item", key))
    expected = sorted((keys[i : i + 2] for i in range(0, 9, 2)), key=lambda batch: digest("batch", batch[0]))
    assert list(map(list, epoch_batches([bucket(9)], seed=5, epoch=2))) == expected


def test_no_epoch_depends_on_those_before_it_or_on_other_generators():
    fifth = epoch_batches(BUCKETS, seed=3, epoch=5)
    random.seed(1)
    torch.manual_seed(1)
    states = random.getstate(), torch.get_rng_state()
    for epoch in range(6):
        last = epoch_batches(BUCKETS, seed=3, epoch=epoch)
    assert last == fifth
    assert random.getstate() == states[0] and torch.equal(torch.get_rng_state(), states[1])


def test_another_item_leaves_the_order_of_the_rest():
    single = bucket(30, batch_size=1)
    more = epoch_batches([single], seed=0, epoch=0)
    fewer = epoch_batches([Bucket(keys=single.keys[1:], batch_size=1)], seed=0, epoch=0)
    assert [batch for batch in more if batch[0] != single.keys[0]] == list(fewer)


def test_stable_number_tells_parts_apart_and_fits_a_generator():
    values = [("a", "b"), ("ab",), ("a", 1), ("a", "1"), (12, 3), (1, 23), (-1,), ("é",), ("e\u0301",)]
    assert len({stable_number(*parts) for parts in values}) == len(values)
    torch.Generator().manual_seed(max(stable_number(i) for i in range(1000)))


# ---- positions ----


def test_a_position_survives_json():
    position = Position(epoch=3, batch=17)
    assert Position.from_dict(json.loads(json.dumps(position.as_dict()))) == position


@pytest.mark.parametrize(
    "saved",
    [{}, {"epoch": 1}, {"epoch": 1, "batch": -1}, {"epoch": "1", "batch": 0}, {"epoch": 1, "batch": 0, "step": 4}]
    + [{"epoch": True, "batch": 0}, {"epoch": 1.0, "batch": 0}],
)
def test_anything_else_is_no_position(saved):
    with pytest.raises(ValueError, match="not a position"):
        Position.from_dict(saved)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_what_follows_a_position_is_the_rest(world):
    batches = epoch_batches(BUCKETS, seed=9, epoch=4)
    for rank in range(world):
        whole = list(share(batches, Position(epoch=4), rank=rank, world=world))
        for done, (_, after) in enumerate(whole[:-1], start=1):
            assert list(share(batches, after, rank=rank, world=world)) == whole[done:]
        assert whole[-1][1] == Position(epoch=5, batch=0)


# ---- processes ----


@pytest.mark.parametrize("world", [1, 2, 3, 5, NUM_BATCHES, 10, 20])
def test_processes_get_equally_many_batches_and_only_the_filling_is_trained_twice(world):
    batches = epoch_batches(BUCKETS, seed=2, epoch=0)
    shares = [[batch for batch, _ in share(batches, Position(), rank=r, world=world)] for r in range(world)]
    num_rounds = -(-NUM_BATCHES // world)
    assert {len(mine) for mine in shares} == {num_rounds}
    in_order = list(chain.from_iterable(zip(*shares, strict=True)))
    assert in_order[:NUM_BATCHES] == list(batches)
    filling = in_order[NUM_BATCHES:]
    assert filling == [batches[i % NUM_BATCHES] for i in range(num_rounds * world - NUM_BATCHES)]


def test_all_processes_are_at_the_same_position():
    batches = epoch_batches(BUCKETS, seed=2, epoch=0)
    positions = [[after for _, after in share(batches, Position(), rank=r, world=3)] for r in range(3)]
    assert positions == [[Position(batch=3), Position(batch=6), Position(epoch=1)]] * 3


def test_training_goes_on_with_another_number_of_processes():
    batches = epoch_batches(BUCKETS, seed=2, epoch=0)
    _, (_, after), *_ = share(batches, Position(), rank=0, world=2)
    rest = [[batch for batch, _ in share(batches, after, rank=r, world=3)] for r in range(3)]
    assert list(chain.from_iterable(zip(*rest, strict=True))) == list(batches[4:])
