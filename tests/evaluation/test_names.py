"""What metrics and results are called."""

import pytest

from ddpm_jax.evaluation import names


def test_the_papers_names_stand_for_inception():
    assert names.parse("fid") == ("fd", "inception")
    assert names.parse("is") == ("is", "inception")
    assert names.parse("kid") == ("kd", "inception")
    assert names.parse("prdc_effnetlite0_64") == ("prdc", "effnetlite0_64")
    assert names.parse("bits_per_dim") == ("bits_per_dim", "")


@pytest.mark.parametrize("name", ["fd", "fd_", "fd_vgg", "FID", "kd_effnetlite0", "is_pixels", ""])
def test_anything_else_is_refused(name):
    with pytest.raises(ValueError, match=r"evaluation\.metrics="):
        names.parse(name)


def test_only_fifty_thousand_samples_in_inception_are_fid():
    assert names.quality_name("fd", "inception", 50_000) == "fid50k_inception"
    assert names.quality_name("is", "inception", 50_000) == "is50k_inception"
    assert names.quality_name("fd", "inception", 10_000) == "fd_inception_10k"
    assert names.quality_name("fd", "pixels", 50_000) == "fd_pixels_50k"
    assert names.quality_name("kd", "inception", 50_000) == "kd_inception_50k"
    assert names.quality_name("kd", "effnetlite0_64", 1234) == "kd_effnetlite0_64_1234"


def test_all_results_of_a_request_are_known_beforehand():
    found = names.results(("bits_per_dim", "prdc_pixels", "fid"), ("test", "train"), 5000)
    assert set(found) == {
        *(f"{v}_{s}" for v in names.BOUND_RESULTS for s in ("test", "train")),
        *(f"{v}_pixels_5k" for v in ("precision", "recall", "density", "coverage")),
        "fd_inception_5k",
    }
    assert found["bits_per_dim_test"].better == "lower" and found["recall_pixels_5k"].unit == ""
    assert found["recall_pixels_5k"].better == "higher"
