"""Settings of every test: quick compilation, one CPU device, no trace outside the test's folder."""

import importlib.metadata
import os
import shutil
import tempfile

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
        "--long", action="store_true", help="the long forms of the layout and fault tests"
    )


def pytest_unconfigure(config):
    """The first process removes the cache when all others have ended."""
    if not hasattr(config, "workerinput"):
        shutil.rmtree(os.environ[OURS], ignore_errors=True)
