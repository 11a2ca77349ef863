"""Buckets, against the vectors of the facts and against what a bucket has to be."""

import random
from math import isqrt

import pytest

from dataset.buckets import bucket_sizes, pick_bucket

RESOLUTIONS = [(960, 544), (256, 256), (640, 640), (832, 480), (512, 512), (1280, 720), (64, 48), (100, 30), (16, 16)]


def test_buckets_of_256_are_the_reference_list():
    upright = [(128, 512), (144, 448), (160, 400), (176, 368), (192, 336), (208, 304), (224, 288), (240, 272)]
    expected = sorted([*upright, (256, 256), *((h, w) for w, h in upright)])
    assert list(bucket_sizes((256, 256))) == expected


def test_buckets_of_960x544_have_the_reference_count_and_ends():
    sizes = bucket_sizes((960, 544))
    assert len(sizes) == 47 and sizes[0] == (352, 1472) and sizes[-1] == (1472, 352)


@pytest.mark.parametrize(
    ("resolution", "size", "bucket"),
    [
        ((960, 544), (1920, 1080), (960, 544)),
        ((960, 544), (512, 512), (720, 720)),
        ((960, 544), (640, 480), (832, 624)),
        ((960, 544), (300, 1000), (400, 1296)),
        ((256, 256), (640, 480), (288, 224)),
        ((640, 640), (1920, 1080), (848, 480)),
        ((640, 640), (640, 480), (720, 560)),
    ],
)
def test_picked_bucket_is_the_reference(resolution, size, bucket):
    assert pick_bucket(size, resolution, enabled=True, no_upscale=False) == bucket


@pytest.mark.parametrize(
    ("size", "bucket"),
    [((500, 300), (496, 288)), ((1000, 500), (992, 496)), ((1920, 1080), (960, 544)), ((10, 500), (16, 496))],
)
def test_small_pictures_keep_their_size_without_upscaling(size, bucket):
    assert pick_bucket(size, (960, 544), enabled=True, no_upscale=True) == bucket


def test_picture_of_exactly_the_area_is_not_upscaled():
    assert pick_bucket((544, 960), (960, 544), enabled=True, no_upscale=True) == (544, 960)
    assert pick_bucket((256, 1), (16, 16), enabled=True, no_upscale=True) == (256, 16)


@pytest.mark.parametrize("no_upscale", [False, True])
def test_without_buckets_everything_gets_the_resolution_itself(no_upscale):
    assert pick_bucket((100, 100), (970, 550), enabled=False, no_upscale=no_upscale) == (970, 550)


@pytest.mark.parametrize("resolution", RESOLUTIONS)
def test_every_bucket_is_whole_tokens_within_the_area_and_has_its_transpose(resolution):
    area, sizes = resolution[0] * resolution[1], bucket_sizes(resolution)
    assert sizes and list(sizes) == sorted(set(sizes))
    for width, height in sizes:
        assert width > 0 and height > 0 and width % 16 == height % 16 == 0 and (height, width) in sizes
        # Rounding takes less than one step off the side that was computed from the other.
        assert width * height <= area and any(a * (b + 16) > area - a for a, b in ((width, height), (height, width)))
        assert min(width, height) <= isqrt(area)


@pytest.mark.parametrize("resolution", RESOLUTIONS)
def test_no_other_bucket_has_a_better_ratio_and_the_first_of_equals_wins(resolution):
    rng = random.Random(0)
    sizes = bucket_sizes(resolution)
    for _ in range(200):
        size = rng.randint(1, 3000), rng.randint(1, 3000)
        distances = [abs(w / h - size[0] / size[1]) for w, h in sizes]
        picked = pick_bucket(size, resolution, enabled=True, no_upscale=False)
        assert sizes.index(picked) == distances.index(min(distances))


@pytest.mark.parametrize(("size", "bucket"), [((25, 10), (32, 32)), ((5, 8), (16, 64))])
def test_ratio_halfway_between_two_buckets_goes_to_the_first_in_sorted_order(size, bucket):
    assert bucket_sizes((32, 32)) == ((16, 64), (32, 32), (64, 16))
    assert pick_bucket(size, (32, 32), enabled=True, no_upscale=False) == bucket


def test_resolution_without_room_for_a_bucket_is_an_error():
    assert bucket_sizes((15, 16)) == ()
    with pytest.raises(ValueError, match="15x16 has no bucket"):
        pick_bucket((100, 100), (15, 16), enabled=True, no_upscale=False)
