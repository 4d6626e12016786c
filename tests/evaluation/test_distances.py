"""Blocked distances against the differences themselves, in float64, pair by pair."""

import tracemalloc

import numpy as np
import pytest

from ddpm_jax.evaluation import distances


def direct(queries, reference):
    """All squared distances from differences, without any matrix product."""
    queries, reference = np.float64(queries), np.float64(reference)
    return np.stack([((reference - row) ** 2).sum(axis=1) for row in queries])


def sorted_neighbours(squared, k):
    order = np.argsort(squared, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(squared, order, axis=1), order


@pytest.mark.parametrize("offset", [0, 1e3, 1e6])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_nearest_finds_the_neighbours_and_their_distances(dtype, offset):
    rng = np.random.default_rng(0)
    queries = (rng.normal(size=(57, 33)) + offset).astype(dtype)
    reference = (rng.normal(size=(101, 33)) + offset).astype(dtype)
    expected, order = sorted_neighbours(direct(queries, reference), 4)
    squared, positions = distances.nearest(queries, reference, k=4)
    np.testing.assert_array_equal(positions, order)
    np.testing.assert_allclose(squared, expected, rtol=1e-13)


def test_ties_go_to_the_lowest_position():
    """Points of a grid, of which many are equally far, and in an order of no meaning."""
    grid = np.stack(np.meshgrid(*[np.arange(7)] * 3), axis=-1).reshape(-1, 3) / 10
    reference = grid[np.random.default_rng(1).permutation(len(grid))]
    # Computed directly, the distances of the grid's points have no rounding that differs.
    integers = np.rint(reference * 10)
    _, order = sorted_neighbours(direct(integers, integers), 12)
    _, positions = distances.nearest(integers + 1e4, integers + 1e4, k=12)
    np.testing.assert_array_equal(positions, order)
    squared = direct(reference, reference)
    expected, order = sorted_neighbours(squared, 12)
    found, positions = distances.nearest(reference, reference, k=12)
    np.testing.assert_array_equal(positions, order)
    np.testing.assert_allclose(found, expected, rtol=1e-14)


def test_identical_rows_are_exactly_zero_apart():
    rng = np.random.default_rng(2)
    reference = np.float32(rng.normal(size=(300, 50)) * 100 + 1e4)
    for block in distances.blocks(reference[::-1], reference, max_bytes=2**16):
        for row, squared in zip(range(300)[block.rows], block.squared, strict=True):
            assert squared[299 - row] == 0
            assert np.count_nonzero(squared) == 299
    squared, positions = distances.nearest(np.float64(reference), reference)
    np.testing.assert_array_equal(squared, 0)
    np.testing.assert_array_equal(positions[:, 0], np.arange(300))


def test_minus_zero_is_zero():
    squared, _ = distances.nearest(np.float32([[-0.0, 1]]), np.float64([[0.0, 1]]))
    assert squared == 0


def test_a_row_is_not_its_own_neighbour_but_its_copy_is():
    rows = np.float32([[0, 0], [5, 5], [0, 0], [1, 0]])
    squared, positions = distances.nearest(rows, rows, k=2, exclude_self=True)
    np.testing.assert_array_equal(squared, [[0, 1], [41, 50], [0, 1], [1, 1]])
    np.testing.assert_array_equal(positions, [[2, 3], [3, 0], [0, 3], [0, 2]])


@pytest.mark.parametrize("max_bytes", [1, 5000, 2**28])
def test_results_do_not_depend_on_the_size_of_blocks(max_bytes):
    rng = np.random.default_rng(3)
    rows = np.float32(rng.normal(size=(60, 9)))
    rows[20:30] = rows[3]
    expected = distances.nearest(rows, rows, 5, exclude_self=True)
    found = distances.nearest(rows, rows, 5, exclude_self=True, max_bytes=max_bytes)
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_array_equal(found[1], expected[1])


def test_blocks_are_within_their_bound_and_settle_exactly():
    """Far from the centre, with some rows so close that a matrix product would lose them."""
    rng = np.random.default_rng(4)
    reference = rng.normal(size=(80, 200)) * 10 + 1e3
    queries = np.concatenate([reference[:40] + 1e-6 * rng.normal(size=(40, 200)), reference[40:]])
    expected = direct(queries, reference)
    seen = 0
    for block in distances.blocks(queries, reference, max_bytes=2**15):
        part = expected[block.rows]
        np.testing.assert_allclose(block.squared, part, rtol=1e-6, atol=0)
        target = np.median(part)
        assert not block.near(target)[np.abs(part - target) > 1e-6 * target].any()
        block.settle(np.ones(part.shape, bool))
        np.testing.assert_allclose(block.squared, part, rtol=1e-13, atol=0)
        seen += len(part)
    assert seen == 80


def test_what_rounding_may_do_is_computed_once_for_a_block():
    """Each look at a threshold makes one array of the block's size, and the answer."""
    queries, reference = np.random.default_rng(6).normal(size=(2, 300, 3))
    (block,) = distances.blocks(queries, reference)
    block.near(1.0)
    tracemalloc.start()
    block.near(2.0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 1 < peak / block.squared.nbytes < 1.3


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_features_are_refused_before_their_powers_overflow(dtype):
    rows = np.ones((4, 2), dtype)
    rows[1, 0] = -1e15
    distances.as_rows(rows, 1, "samples")
    for value in (-1.1e15, 1e30):
        rows[2, 1] = value
        with pytest.raises(ValueError, match=r"^samples: .* magnitude 1\S+; rescale .* 1e\+15$"):
            distances.as_rows(rows, 1, "samples")


def test_a_collapsed_set_is_compared_in_little_time_and_memory():
    """Four million pairs of copies: settled by their hashes, not by their differences."""
    rows = np.tile(np.float32(np.random.default_rng(5).normal(size=(1, 512))), (2000, 1))
    squared, positions = distances.nearest(rows, rows, 3, exclude_self=True)
    np.testing.assert_array_equal(squared, 0)
    np.testing.assert_array_equal(positions[:2], [[1, 2, 3], [0, 2, 3]])


def test_integers_and_low_precision_become_float64():
    images = np.uint8([[0, 255], [255, 0], [250, 0]])
    squared, positions = distances.nearest(images[:2], images, k=1, exclude_self=False)
    np.testing.assert_array_equal(squared, 0)
    squared, positions = distances.nearest(images, images, 1, exclude_self=True)
    np.testing.assert_array_equal(squared[:, 0], [250**2 + 255**2, 25, 25])
    np.testing.assert_array_equal(positions[:, 0], [2, 2, 1])


@pytest.mark.parametrize(
    ("queries", "reference", "k", "exclude_self", "words"),
    [
        (np.zeros((3, 2)), np.zeros((3, 3)), 1, False, "reference: 3 features a row"),
        (np.zeros((3, 2)), np.zeros((3, 2)), 4, False, "at least 4"),
        (np.zeros((3, 2)), np.zeros((3, 2)), 3, True, "at least 4"),
        (np.zeros((3, 2)), np.zeros((3, 2)), 0, False, "k=0: at least 1"),
        (np.zeros((3, 2)), np.full((3, 2), 1e200), 1, False, "reference: .* 1e[+]200; rescale"),
        (np.zeros((2, 2)), np.zeros((3, 2)), 1, True, "reference rows themselves"),
        (np.zeros(3), np.zeros((3, 2)), 1, False, "rows of features"),
        (np.float32([[1, np.nan], [np.inf, 1], [1, 1]]), np.zeros((3, 2)), 1, False, "2 of 3 rows"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(queries, reference, k, exclude_self, words):
    with pytest.raises(ValueError, match=words) as error:
        distances.nearest(queries, reference, k, exclude_self)
    assert "\n" not in str(error.value)
