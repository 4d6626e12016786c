"""Settings of every test: quick compilation, one CPU device, no trace outside the test's folder."""

import importlib.metadata
import os
import shutil
import tempfile

import pytest

# Before JAX starts. Compiling takes most of the time here, and the code runs for moments. What one
# process has compiled the others read; those that pytest-xdist starts inherit the environment.
QUICK, OURS = "--xla_backend_optimization_level=0", "DDPM_JAX_TESTS_CACHE"
if importlib.metadata.version("jaxlib").startswith("0.10."):  # Others may not know it, and stop.
    QUICK += " --xla_cpu_use_fusion_emitters=false"  # Half of the compilation.
if QUICK not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICK}"
if OURS not in os.environ:
    os.environ[OURS] = tempfile.mkdtemp(prefix="ddpm_jax_tests_")
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ[OURS]


def pytest_addoption(parser):
    parser.addoption(
        "--long", action="store_true", help="also tests marked long, and others in their long form"
    )


# Files that take longest, dealt out first: one process would sit over the last of them alone.
FIRST = (
    "test_together",
    "test_training",
    "test_failures",
    "test_layouts",
    "test_hosts",
    "test_autoregressive",
    "test_sweep",
)


def pytest_configure(config):
    if hasattr(config.option, "loadscopereorder"):  # pytest-xdist's: files with most tests first.
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(config, items):
    rank = {name: place for place, name in enumerate(FIRST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(FIRST)))
    if not config.getoption("--long"):
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(pytest.mark.skip(reason="needs --long"))


def pytest_unconfigure(config):
    """The first process removes the cache when all others have ended."""
    if not hasattr(config, "workerinput"):
        shutil.rmtree(os.environ[OURS], ignore_errors=True)


@pytest.fixture
def tally(record_property):
    """Counts what a fault test has tried, for the summary."""
    counts = {}
    record_property("faults", counts)

    def count(what):
        counts[what] = counts.get(what, 0) + 1

    return count


def pytest_terminal_summary(terminalreporter):
    """What the fault tests have tried, and what was lost."""
    counts, failures = {}, 0
    for report in [r for rs in terminalreporter.stats.values() for r in rs]:
        if "tests/faults/" not in getattr(report, "nodeid", ""):
            continue
        failures += getattr(report, "failed", False)
        for name, found in getattr(report, "user_properties", ()):
            if name == "faults" and report.when == "call":
                for what, number in found.items():
                    counts[what] = counts.get(what, 0) + number
    if not counts:
        return
    parts = []
    for kind in ("kills", "signals", "corruptions"):
        where = [
            f"{n} {what[len(kind) + 1 :]}"
            for what, n in sorted(counts.items())
            if what.startswith(f"{kind} ")
        ]
        parts.append(f"{counts.get(kind, 0)} {kind}" + (f" ({', '.join(where)})" if where else ""))
    lost = f"see {failures} failures" if failures else "nothing"
    terminalreporter.write_line(f"faults: {', '.join(parts)}; lost: {lost}")
