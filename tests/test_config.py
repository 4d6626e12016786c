"""Configs: the paper's table, every file and variant, and one line for whatever is wrong."""

import itertools
import pathlib

import pytest

from ddpm_jax import config as config_lib
from ddpm_jax import losses
from ddpm_jax.config import FIELDS, RequestError, default_config, load_file, override, validate
from ddpm_jax.diffusion import PREDICTIONS, VARIANCES
from ddpm_jax.runs import make_model

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"

# The paper, appendix B and §4, and the authors' scripts: width, multipliers, batch, learning rate,
# dropout, flips, steps, variance.
PAPER = {
    "cifar10.py": (128, (1, 2, 2, 2), 128, 2e-4, 0.1, True, 800_000, "fixed_large"),
    "celeba_hq.py": (128, (1, 1, 2, 2, 4, 4), 64, 2e-5, 0.0, True, 500_000, "fixed_small"),
    "lsun.py": (128, (1, 1, 2, 2, 4, 4), 64, 2e-5, 0.0, True, 1_200_000, "fixed_small"),
    "lsun.py:church": (128, (1, 1, 2, 2, 4, 4), 64, 2e-5, 0.0, True, 1_200_000, "fixed_small"),
    "lsun.py:cat": (128, (1, 1, 2, 2, 4, 4), 64, 2e-5, 0.0, True, 1_800_000, "fixed_small"),
    "lsun.py:bedroom": (128, (1, 1, 2, 2, 4, 4), 64, 2e-5, 0.0, False, 2_400_000, "fixed_small"),
    "lsun.py:bedroom_large": (
        192, (1, 1, 2, 2, 4, 4), 64, 2e-5, 0.0, False, 1_150_000, "fixed_small",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PAPER)
def test_configs_hold_the_papers_hyper_parameters(name):
    config = load_file(str(CONFIGS / name))
    validate(config)
    model, train = config.model, config.train
    assert PAPER[name] == (
        model.channels,
        model.channel_multipliers,
        train.batch_size,
        train.learning_rate,
        model.dropout,
        config.data.flip,
        train.steps,
        config.diffusion.variance,
    )
    assert (model.num_res_blocks, model.attention_resolutions, model.norm_groups) == (2, (16,), 32)
    assert (train.warmup_steps, train.clip_norm, train.ema_decay) == (5000, 1.0, 0.9999)
    assert not train.ema_ramp
    assert (train.objective, train.timesteps) == ("simple", "independent")
    diffusion = config.diffusion
    assert (diffusion.schedule, diffusion.num_steps, diffusion.prediction) == (
        "linear",
        1000,
        "eps",
    )
    assert (diffusion.beta_start, diffusion.beta_end) == (1e-4, 0.02)
    assert (config.sample.method, config.sample.steps, config.sample.clip) == ("ancestral", 0, True)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda path: path.stem)
def test_every_config_builds_with_every_sensible_combination(path):
    for choices in itertools.product(PREDICTIONS, VARIANCES, losses.OBJECTIVES):
        config = load_file(f"{path}:{','.join(choices)}")
        assert (config.diffusion.prediction, config.diffusion.variance) == choices[:2]
        assert config.train.objective == choices[2]
        learned = choices[1].startswith("learned")
        if (choices[2] == "simple" and learned) or (choices[2] == "hybrid" and not learned):
            with pytest.raises(RequestError, match="variance"):
                validate(config)
        else:
            validate(config)
            assert make_model(config).out_channels == config.data.channels * (1 + learned)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda path: path.stem)
def test_every_config_opens_with_its_command_cost_and_expectation(path):
    text = path.read_text()
    docstring = text.split('"""')[1]
    assert f"python -m ddpm_jax.main --config=configs/{path.name}" in docstring
    assert "Cost: " in docstring and "Expected" in docstring


def test_every_field_has_a_meaning_and_a_valid_default():
    validate(default_config())
    assert all(field.meaning for field in FIELDS.values())


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("train.batch_size", "64", 64),
        ("train.learning_rate", "3e-4", 3e-4),
        ("train.learning_rate", "1", 1.0),
        ("model.channel_multipliers", "1,2", (1, 2)),
        ("model.channel_multipliers", "(1, 2, 4)", (1, 2, 4)),
        ("model.attention_resolutions", "8", (8,)),
        ("model.attention_resolutions", "()", ()),
        ("data.flip", "false", False),
        ("data.flip", "True", True),
        ("data.name", "celeb_a_hq/256", "celeb_a_hq/256"),
    ],
)
def test_overrides_take_the_type_of_the_field(key, text, value):
    config = default_config()
    override(config, key, text)
    found = config_lib.get(config, key)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("key", "text", "parts"),
    [
        ("modle.channels", "64", ["modle.channels", "did you mean model.channels?"]),
        ("train.bach_size", "64", ["did you mean train.batch_size?"]),
        ("train.batch_size", "many", ["train.batch_size=many", "an integer"]),
        ("train.batch_size", "1.5", ["train.batch_size=1.5", "an integer"]),
        ("train.learning_rate", "fast", ["train.learning_rate=fast", "a number"]),
        ("data.flip", "maybe", ["data.flip=maybe", "true or false"]),
        ("model.channel_multipliers", "1,2.5", ["channel_multipliers=1,2.5", "integers"]),
        ("model.channel_multipliers", "a", ["integers such as 1,2,2"]),
    ],
)
def test_wrong_overrides_are_one_line_that_names_the_fix(key, text, parts):
    with pytest.raises(RequestError) as caught:
        override(default_config(), key, text)
    assert "\n" not in str(caught.value)
    assert all(part in str(caught.value) for part in parts), caught.value


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        ({"diffusion.prediction": "epsilon"}, ["eps, mu, x0, v", "did you mean eps?"]),
        ({"diffusion.variance": "fixed"}, ["fixed_large, fixed_small, learned, learned_range"]),
        ({"diffusion.variance": "learned"}, ["never train the variance", "vlb or hybrid"]),
        ({"train.objective": "hybrid"}, ["no variance to train"]),
        ({"diffusion.num_steps": 10, "diffusion.beta_end": 2.0}, ["beta_end=2.0", "between 0"]),
        ({"diffusion.num_steps": 10, "diffusion.beta_end": 1.0}, ["beta at t = 10", "(0, 1)"]),
        ({"diffusion.schedule": "cosin"}, ["did you mean cosine?"]),
        ({"diffusion.num_steps": 0}, ["num_steps=0", "at least 1"]),
        ({"data.image_size": 30}, ["image_size=30", "divide by 8"]),
        ({"model.attention_resolutions": (7,)}, ["attention_resolutions=7", "32, 16, 8, 4"]),
        ({"model.channels": 33}, ["channels=33", "even"]),
        ({"model.channel_multipliers": ()}, ["channel_multipliers is empty"]),
        ({"model.channel_multipliers": (1, 0)}, ["channel_multipliers=(1, 0)", "at least 1"]),
        ({"model.dropout": 1.0}, ["dropout=1.0", "between 0 and 0.99"]),
        ({"model.dtype": "float16"}, ["float32, bfloat16"]),
        ({"train.steps_per_call": 3}, ["does not divide by train.steps_per_call=3"]),
        ({"train.learning_rate": float("inf")}, ["learning_rate=inf", "finite"]),
        ({"train.batch_size": 0}, ["batch_size=0", "at least 1"]),
        ({"parallel.microbatches": 3}, ["does not divide by parallel.microbatches=3"]),
        ({"sample.steps": 1001}, ["sample.steps=1001", "num_steps=1000"]),
        ({"sample.eta": 0.5}, ["sample.method=ddim only"]),
        ({"sample.method": "euler"}, ["ancestral, ddim"]),
        (
            {"diffusion.variance": "learned", "train.objective": "vlb", "sample.steps": 50},
            ["single steps", "learned_range"],
        ),
    ],
)
def test_impossible_configs_are_refused_in_one_line(overrides, parts):
    config = default_config()
    for key, value in overrides.items():
        override(config, key, value)
    with pytest.raises(RequestError) as caught:
        validate(config)
    assert "\n" not in str(caught.value)
    assert all(part in str(caught.value) for part in parts), caught.value


def test_unknown_variants_and_files_are_answered_with_the_known():
    with pytest.raises(RequestError, match=r"unknown variant 'nu'; known: .*bedroom.*eps, mu"):
        load_file(f"{CONFIGS / 'lsun.py'}:nu")
    with pytest.raises(RequestError, match=r"there are .*cifar10\.py"):
        load_file(str(CONFIGS / "cifar.py"))


def test_variants_that_contradict_each_other_are_refused():
    with pytest.raises(RequestError, match=r"mu and eps both set diffusion\.prediction"):
        load_file(f"{CONFIGS / 'digits.py'}:mu,eps")
    with pytest.raises(RequestError, match=r"church and cat both set data\.name"):
        load_file(f"{CONFIGS / 'lsun.py'}:church,cat")


@pytest.mark.parametrize(
    ("body", "part"),
    [
        ("config.modle.channels = 3", "modle"),
        ("config.train.steps = 'many'", "TypeError"),
        ("syntax error", "SyntaxError"),
        ("return None", "returns no ConfigDict"),
    ],
)
def test_a_config_file_that_fails_is_named_in_one_line(tmp_path, body, part):
    path = tmp_path / "mine.py"
    path.write_text(
        "from ddpm_jax.config import default_config\n"
        f"def get_config(variants):\n    config = default_config()\n    {body}\n    return config\n"
    )
    with pytest.raises(RequestError) as caught:
        load_file(str(path))
    assert part in str(caught.value) and "mine.py" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_configs_survive_json():
    config = load_file(f"{CONFIGS / 'cifar10.py'}:small,mu,vlb,learned_range")
    again = config_lib.from_json(config_lib.to_json(config))
    assert again == config
    assert type(again.model.channel_multipliers) is tuple


def test_configs_saved_with_an_unknown_key_are_refused():
    with pytest.raises(RequestError, match=r"did you mean train\.steps"):
        config_lib.from_json('{"train": {"step": 3}}')
