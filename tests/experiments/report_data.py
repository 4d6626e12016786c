"""A run and a sweep of hand-made files, as the report meets them; nothing is trained."""

import json

import numpy as np
from etils import epath

from ddpm_jax import config as config_lib
from ddpm_jax import figures
from ddpm_jax.evaluation import manifest
from ddpm_jax.evaluation.manifest import Manifest, Measured
from ddpm_jax.runs import RunDirectory

STEPS = (10, 20, 30)
TIMES = (0, 5, 10)
HOSTILE = '</script><img src=x onerror="document.title=1"> & "quotes"'


def images(count, seed=0, size=8):
    """uint8 [count, size, size, 1]."""
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 1), np.uint8)


def make_run(path, steps=STEPS):
    """A run with metrics, and a grid of samples at each step; returns its directory."""
    directory = RunDirectory(epath.Path(path))
    config = config_lib.default_config()
    for key, value in {"data.name": "digits", "data.image_size": 8, "data.channels": 1}.items():
        config_lib.override(config, key, value)
    directory.path.mkdir(parents=True)
    directory.config.write_text(config_lib.to_json(config))
    lines = [{"step": s, "loss": 1 / s, "grad_norm": 2.0 * s, "learning_rate": 0.01} for s in steps]
    lines.append({"step": steps[-1], "bits_per_dim_test": 4.0, "bits_per_dim_test_error": 0.5})
    directory.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for step in steps:
        figures.save_png(directory.samples / f"step_{step:08d}.png", figures.grid(images(4, step)))
    return directory


def add_bound(directory, step=30):
    """A result of bits/dim with the bound's arrays, which have a gap; returns the terms [11]."""
    terms = np.linspace(2.0, 0.1, 11)
    terms[4] = np.nan
    arrays = {"terms": terms, "terms_error": terms / 10}
    directory.evaluation.mkdir(parents=True, exist_ok=True)
    np.savez(f"{directory.evaluation}/step{step}_bound_test_x.npz", **arrays)
    details = {"arrays": f"step{step}_bound_test_x.npz"}
    protocol = {"data": "digits", "split": "test"}
    for value, time in ((9.87, "2025"), (4.56, "2026")):  # The later one counts.
        m = Measured(value, 0.02, "bits/dim", "lower", protocol, {}, details)
        path = directory.evaluation / f"step{step}_bits_per_dim_test_{time}.json"
        manifest.save(path, Manifest("bits_per_dim_test", m, {"checkpoint": step}, {"time": time}))
    return terms


def add_study(directory, name, title="A study", rows="a,b\n1,2\n", arrays=None):
    """A study's three files."""
    figures.save_png(directory.figures / f"{name}.png", figures.grid(images(2)))
    (directory.figures / f"{name}.csv").write_text(rows)
    content = {
        "name": name,
        "title": title,
        "notes": ["A note."],
        "figure": f"{name}.png",
        "table": f"{name}.csv",
        "arrays": arrays,
        "protocol": {},
        "subject": {"checkpoint": 30},
        "provenance": {},
    }
    (directory.figures / f"{name}.json").write_text(json.dumps(content))


def add_path(directory):
    """The study of x̂_0 over time; returns its frames [3, 4, 8, 8, 1], at TIMES."""
    frames = np.stack([images(4, 100 + t) for t in TIMES])
    directory.evaluation.mkdir(parents=True, exist_ok=True)
    np.savez(f"{directory.evaluation}/path.npz", frames=frames, times=np.array(TIMES))
    add_study(directory, "progressive_generation", "Over time", arrays="path.npz")
    return frames


def add_coding(directory):
    """The study of rate and distortion."""
    rows = "t,steps_done,rate,rate_error,rmse,rmse_error,images\n"
    rows += "3,1,0.1,0.01,60,1,9\n2,2,0.5,0.01,20,,9\n1,3,1.5,0.02,,,0\n"
    add_study(directory, "progressive_coding", "Compression", rows)


def full_run(path):
    """A run that has something for every section."""
    directory = make_run(path)
    with directory.metrics.open("a") as file:
        file.write(json.dumps({"step": 40, "loss": 0.01, HOSTILE: 1.0}) + "\n")
    add_bound(directory)
    add_path(directory)
    add_coding(directory)
    wide = ",".join(f"a_rather_long_name_{k}" for k in range(12))
    add_study(directory, "other", HOSTILE, f"{wide}\n{HOSTILE.replace(chr(34), '')},1\n")
    directory.provenance.write_text(
        json.dumps([{"from_step": 0, "commit": "abc-dirty", "command": f"python {HOSTILE}"}])
    )
    return directory


def make_sweep(path, cells=("eps-simple", "mu-vlb-learned"), seeds=(0, 1)):
    """A sweep's directory: the second run has diverged, the last one is not there yet."""
    path = epath.Path(path)
    rows = ["cell,seed,status,train_seconds,train.steps,fd_pixels_500,fd_pixels_500_error,outside"]
    for c, cell in enumerate(cells):
        for seed in seeds:
            last = (cell, seed) == (cells[-1], seeds[-1])
            bad = c == 0 and seed == seeds[1]
            if not last:
                make_run(path / cell / f"seed{seed}")
            status = "missing" if last else '"diverged: loss, at step 3"' if bad else "done"
            values = ",,," if last or bad else f"{c + 1 + seed / 10},0.1,0.5"
            rows.append(f"{cell},{seed},{status},7,30,{values}".removesuffix(","))
    (path / "results.csv").write_text("\n".join(rows) + "\n")
    head, line = " | a_rather_long_heading" * 6, "| eps-simple | 1.0 ± 0.1 |" + " |" * 6
    (path / "results.md").write_text(
        f"# A <sweep>\n\n```\npython -m x\n```\n\n**Group**\n\n| cell | FD{head} |\n"
        f"|{'---|' * 8}\n{line}\n\nMeans.\n"
    )
    figures.save_png(path / "results.png", figures.grid(images(2)))
    return path
