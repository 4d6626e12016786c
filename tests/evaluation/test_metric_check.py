"""The sets of spoiled images, and the table over them."""

import numpy as np
import pytest
from scipy import ndimage

from ddpm_jax.data import ArraySource
from experiments import metric_check

RNG = np.random.default_rng(2)
IMAGES = RNG.integers(0, 256, (30, 9, 7, 3), dtype=np.uint8)
LABELS = np.arange(30) % 10


@pytest.mark.parametrize("deviation", [0.5, 1.0])
def test_blur_is_gaussian(deviation):
    expected = ndimage.gaussian_filter(
        IMAGES.astype(float), (0, deviation, deviation, 0), mode="nearest", truncate=4
    )
    got = metric_check.blur(IMAGES, deviation)
    assert np.abs(got - expected).max() < 0.501
    assert got.dtype == np.uint8


def test_every_set_has_its_fault_and_as_many_images():
    source = ArraySource("toys", "test", IMAGES, LABELS)
    sets = metric_check.spoiled(IMAGES, metric_check.of_two_classes(source, len(IMAGES)))
    assert all(images.shape == IMAGES.shape for images in sets.values())
    assert (sets["real"] == IMAGES).all()
    middle = (IMAGES > 70) & (IMAGES < 185)
    noise = (sets["noise 20"].astype(float) - IMAGES)[middle]
    assert noise.std() == pytest.approx(20, rel=0.05) and abs(noise.mean()) < 2
    kept = {tuple(image.ravel()) for image in sets[metric_check.FEW_CLASSES]}
    assert kept == {tuple(image.ravel()) for image in IMAGES[(LABELS == 3) | (LABELS == 5)]}
    assert len({tuple(image.ravel()) for image in sets["90 % copies"]}) == 3
    assert metric_check.of_two_classes(ArraySource("toys", "test", IMAGES), 3) is None
    assert metric_check.FEW_CLASSES not in metric_check.spoiled(IMAGES)


def test_the_table_puts_the_real_digits_first(tmp_path, capsys):
    out = tmp_path / "table.md"
    flags = ["--config=configs/digits.py", "--features=pixels", "--count=250", f"--out={out}"]
    flags.append(f"--config.evaluation.cache_dir={tmp_path}")
    assert metric_check.main(flags) == 0
    rows = [line.split(" | ") for line in out.read_text().splitlines()[2:]]
    values = {row[0].strip("| "): float(row[1].split(" ± ")[0]) for row in rows}
    assert len(values) == 9
    assert values["real"] < values["noise 20"] < values["blur 0.5"] < values["blur 1"]
    assert values["real"] < min(values[metric_check.FEW_CLASSES], values["90 % copies"])
    assert out.with_suffix(".png").exists()
    for count in (257, 2, 0, -1):
        assert metric_check.main([*flags, f"--count={count}"]) == 2
        assert "choose 20 to 256" in capsys.readouterr().err
