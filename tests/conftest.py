"""Settings of every test: quick compilation, one CPU device, no trace outside the test's folder."""

import os
import tempfile

# Before JAX starts. Compiling takes most of the time here, and the code runs for moments.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"
os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="ddpm_jax_tests_")
