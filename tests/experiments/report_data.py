"""A run and a sweep of hand-made files, as the report meets them; nothing is trained."""

import csv
import html.parser
import io
import json
import shlex
import urllib.parse

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


def make_run(path, steps=STEPS, **overrides):
    """A run with metrics, and a grid of samples at each step; returns its directory."""
    directory = RunDirectory(epath.Path(path))
    config = config_lib.default_config()
    digits = {"data.name": "digits", "data.image_size": 8, "data.channels": 1}
    for key, value in (digits | overrides).items():
        config_lib.override(config, key, value)
    directory.path.mkdir(parents=True)
    directory.config.write_text(config_lib.to_json(config))
    lines = [{"step": s, "loss": 1 / s, "grad_norm": 2.0 * s, "learning_rate": 0.01} for s in steps]
    lines.append({"step": steps[-1], "bits_per_dim_test": 4.0, "bits_per_dim_test_error": 0.5})
    directory.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for step in steps:
        figures.save_png(directory.samples / f"step_{step:08d}.png", figures.grid(images(4, step)))
    return directory


def bound_arrays(sign=1):
    """Of evaluation.bound.Bound with T = 10. L_4 has a gap, and L_5 is of a single image."""
    terms = sign * np.linspace(2.0, 0.1, 11)
    terms[4] = np.nan
    arrays = {
        "terms": terms,
        "x0_mse": 0.001 * np.arange(11.0),
        "eps_mse": 0.9 - 0.05 * np.arange(11),
        "rate": 5.0 - 0.3 * np.arange(11),
    }
    arrays |= {f"{name}_error": abs(values) / 10 for name, values in arrays.items()}
    arrays["terms_error"][5] = np.nan
    return arrays


def add_result(directory, name, value, time="2026", step=30, arrays=None, config=None, **protocol):
    """A result's manifest, with arrays if they are given."""
    directory.evaluation.mkdir(parents=True, exist_ok=True)
    stem, details = f"step{step}_{name}_{manifest.digest(value, protocol)}", {}
    if arrays:
        details = {"arrays": f"{stem}_bound.npz"}
        np.savez(f"{directory.evaluation}/{details['arrays']}", **arrays)
    m = Measured(value, 0.02, "bits/dim", "lower", protocol, {"terms": 30, "draws": 2}, details)
    subject = {"checkpoint": step, "config": config or {}}
    path = directory.evaluation / f"{stem}.json"
    manifest.save(path, Manifest(name, m, subject, {"time": time}))
    return path


def add_bound(directory, sign=1):
    """Bits/dim of the test split: an old one, and a new one with the bound's arrays."""
    protocol = {"data": "digits", "split": "test", "chain": "all"}
    add_result(directory, "bits_per_dim_test", 9.87, "2025", **protocol)  # The later one counts.
    add_result(directory, "bits_per_dim_test", 4.56, arrays=bound_arrays(sign), **protocol)


def add_samples(directory, name, seed=0, clip=True):
    """Samples with their grid and protocol, as --mode=sample leaves them, by hand."""
    drawn, how = images(4, seed), {"sampler": "ancestral", "steps": 1000, "eta": 0.0, "seed": 0}
    figures.save_png(directory.samples / f"{name}_grid_00000.png", figures.grid(drawn))
    protocol = json.dumps(how | {"clip": clip, "count": 4})
    np.savez(f"{directory.samples}/{name}.npz", images=drawn, protocol=protocol)


def add_study(directory, name, title="A study", rows="a,b\n1,2\n", **more):
    """A study's three files; more: of its JSON."""
    figures.save_png(directory.figures / f"{name}.png", figures.grid(images(2)))
    (directory.figures / f"{name}.csv").write_text(rows)
    content = {
        "name": name,
        "title": title,
        "notes": ["A note."],
        "figure": f"{name}.png",
        "table": f"{name}.csv",
        "arrays": None,
        "protocol": {},
        "subject": {"checkpoint": 30},
        "provenance": {},
        **more,
    }
    (directory.figures / f"{name}.json").write_text(json.dumps(content))


def add_path(directory):
    """The study of x̂_0 over time; returns its frames [3, 4, 8, 8, 1], at TIMES."""
    frames = np.stack([images(4, 100 + t) for t in TIMES])
    directory.evaluation.mkdir(parents=True, exist_ok=True)
    np.savez(f"{directory.evaluation}/path.npz", frames=frames, times=np.array(TIMES))
    config = {"diffusion": {"num_steps": 1000}, "evaluation": {"steps": 100, "metrics": ["fid"]}}
    protocol = {"chain": 100, "shape": [8, 8, 1], "times": list(range(50)), "of": {"split": "test"}}
    more = {"protocol": protocol, "subject": {"checkpoint": 30, "config": config}}
    add_study(directory, "progressive_generation", "Over time", arrays="path.npz", **more)
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
    row = HOSTILE.replace('"', "") + ",1" * 11
    add_study(directory, "other", HOSTILE, f"{wide}\n{row}\n")
    directory.provenance.write_text(
        json.dumps([{"from_step": 0, "commit": "abc-dirty", "command": f"python {HOSTILE}"}])
    )
    return directory


CELLS = ("eps-simple", "mu-vlb-learned_range")
# {(cell, seed): (status, FD, share out of range)}.
SWEEP_RUNS = {
    (CELLS[0], 0): ("done", 1.0, 0.5),
    (CELLS[0], 1): ("done", 1.5, 0.25),
    (CELLS[0], 2): ('"diverged: loss, at step 3"', "", ""),
    (CELLS[1], 0): ("done", 2.0, 0.5),
    (CELLS[1], 1): ("missing", "", ""),
}


def sweep_command(path):
    """The command that results.md names."""
    workdir = shlex.quote(str(path))
    return f"python -m experiments.sweep --sweep=a/sweep.py --workdir={workdir} --seeds=3"


def make_sweep(path, runs=SWEEP_RUNS):
    """A sweep's directory: a run has diverged, the last one is not there yet."""
    path = epath.Path(path)
    rows = ["cell,seed,status,train_seconds,train.steps,fd_pixels_500,fd_pixels_500_error,outside"]
    rows[0] += ",rate_train,rate_test"
    for (cell, seed), (status, fd, outside) in runs.items():
        error = fd and 0.1
        rows.append(f"{cell},{seed},{status},{7 + seed},30,{fd},{error},{outside},{fd},{fd}")
        if status != "missing":
            run = make_run(path / cell / f"seed{seed}", seed=seed)
            start = {"commit": f"{'ab' if seed else 'cd'}" * 20, "devices": "1 cpu", "hosts": 1}
            run.provenance.write_text(json.dumps([start | {"versions": {"jax": "1.2.3"}}]))
    (path / "results.csv").write_text("\n".join(rows) + "\n")
    head, line = " | a_rather_long_heading" * 6, "| eps-simple | 1.0 ± 0.1 |" + " |" * 6
    (path / "results.md").write_text(
        f"# A <sweep>\n\n```\n{sweep_command(path)}\n```\n\n**Group**\n\n| cell | FD{head} |\n"
        f"|{'---|' * 8}\n{line}\n\nMeans; `outside` is a share.\n"
    )
    figures.save_png(path / "results.png", figures.grid(images(2)))
    return path


class Page(html.parser.HTMLParser):
    """A parsed page: its elements as (tag, attributes), texts of scripts, headings; balanced."""

    def __init__(self, path):
        super().__init__(convert_charrefs=True)
        self.elements, self.open, self.scripts, self.text = [], [], [], ""
        self.cells, self.labels, self.values = [], [], []
        self.feed(path.read_text())
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), (tag, names)
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "img", "input", "br"):
            self.open.append(tag)
        kept = {"td": self.cells, "th": self.cells, "dt": self.labels, "dd": self.values}
        if tag in kept:
            kept[tag].append("")
        if tag == "script":
            self.scripts.append([dict(attrs).get("class"), ""])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts[-1][1] += data
            return
        kept = {"td": self.cells, "th": self.cells, "dt": self.labels, "dd": self.values}
        for tag in {*self.open} & {*kept}:
            kept[tag][-1] += data
        if "style" not in self.open:
            self.text += f"{data}\n" if self.open and self.open[-1] in ("td", "th") else data

    @property
    def tiles(self):
        """(label, value)."""
        return list(zip(self.labels, self.values, strict=True))

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    def json(self, kind):
        return [json.loads(text) for name, text in self.scripts if name == kind]

    def download(self, name):
        """The rows of a table that can be downloaded."""
        (uri,) = [a["href"] for a in self.all("a") if a.get("download") == name]
        text = urllib.parse.unquote(uri.removeprefix("data:text/csv;charset=utf-8,"))
        return list(csv.reader(io.StringIO(text)))

    def plot(self, key):
        return next(spec for spec in self.json("spec") if spec["key"] == key)
