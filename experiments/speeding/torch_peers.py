"""The peers, which run in PyTorch: diffusers' U-Net, and denoising-diffusion-pytorch as published.

    python -m experiments.speeding.torch_peers KIND SPECIFICATION

KIND is `diffusers` or `lucidrains`, then, joined by +, `compile`, `channels_last`, `bf16`. Each
does what our training and sampling do: uint8 images, flips, clipping, Adam, the moving average.
Nothing of JAX is imported, which would count as the peer's time and memory.
"""

from __future__ import annotations

import contextlib
import functools
import json
import sys
import time
from typing import Any

import numpy as np
import torch

from experiments.speeding.server import peak_bytes, serve

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def wait() -> None:
    """Returns when all work is done."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


class Diffusion:
    """ε-prediction with L_simple and the ancestral sampler, around diffusers' `UNet2DModel`."""

    def __init__(self, work: dict[str, Any]):
        from diffusers import UNet2DModel

        self.network = UNet2DModel.from_config(work["network"]).to(DEVICE)
        self.call = lambda x, t: self.network(x, t).sample
        self.steps = work["num_steps"]
        beta = np.asarray(work["beta"])  # At 0..T.
        alpha_bar = np.cumprod(1 - beta)
        before = np.concatenate([[1.0], alpha_bar[:-1]])
        noise = 1 - alpha_bar
        with np.errstate(divide="ignore", invalid="ignore"):  # There is no step from t = 0.
            table = {
                "keep": np.sqrt(alpha_bar),
                "noise": np.sqrt(noise),
                "x0_of_x": 1 / np.sqrt(alpha_bar),
                "x0_of_noise": np.sqrt(1 / alpha_bar - 1),
                "mean_of_x0": np.sqrt(before) * beta / noise,
                "mean_of_x": np.sqrt(1 - beta) * (1 - before) / noise,
                "sigma": np.sqrt(beta),
            }
        self.table = {
            name: torch.tensor(x, dtype=torch.float32, device=DEVICE)[:, None, None, None]
            for name, x in table.items()
        }

    def losses(self, x0: torch.Tensor, t: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """The mean squared error of ε of images in [−1, 1]; t in 1..T."""
        x_t = self.table["keep"][t] * x0 + self.table["noise"][t] * noise
        return torch.nn.functional.mse_loss(self.call(x_t, t - 1).float(), noise)

    def loss(self, images: torch.Tensor) -> torch.Tensor:
        """The training loss of images in 0..1."""
        t = torch.randint(1, self.steps + 1, (len(images),), device=DEVICE)
        return self.losses(2 * images - 1, t, torch.randn_like(images))

    def reverse(self, x: torch.Tensor, t: int) -> torch.Tensor:
        """x_{t−1} from x_t."""
        at = {name: column[t] for name, column in self.table.items()}
        out = self.call(x, torch.full((len(x),), t - 1, device=DEVICE)).float()
        x0 = (at["x0_of_x"] * x - at["x0_of_noise"] * out).clamp(-1, 1)
        mean = at["mean_of_x0"] * x0 + at["mean_of_x"] * x
        return mean + at["sigma"] * torch.randn_like(x) if t > 1 else mean


class Lucidrains:
    """denoising-diffusion-pytorch as published, at our widths: another, smaller network."""

    def __init__(self, work: dict[str, Any]):
        from denoising_diffusion_pytorch import GaussianDiffusion, Unet

        size, _, channels = work["shape"]
        self.network = Unet(
            dim=work["channels"],
            dim_mults=tuple(work["channel_multipliers"]),
            channels=channels,
            dropout=work["dropout"],
        ).to(DEVICE)
        self.diffusion = GaussianDiffusion(
            self.network,
            image_size=size,
            timesteps=work["num_steps"],
            objective="pred_noise",
            beta_schedule="linear",
        ).to(DEVICE)
        self.loss = self.diffusion

    def reverse(self, x: torch.Tensor, t: int) -> torch.Tensor:
        """x_{t−1} from x_t."""
        return self.diffusion.p_sample(x, t - 1)[0]


class Peer:
    """A peer's training and sampling of a workload, as `contest.specification` describes it."""

    def __init__(self, kind: str, work: dict[str, Any]):
        torch.manual_seed(0)
        # What XLA does by itself.
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.benchmark = True
        name, *options = kind.split("+")
        self.kind, self.work = kind, work
        self.method = {"diffusers": Diffusion, "lucidrains": Lucidrains}[name](work)
        network = self.method.network
        if "channels_last" in options:
            network.to(memory_format=torch.channels_last)
        self.format = torch.channels_last if "channels_last" in options else torch.contiguous_format
        if "compile" in options:
            network.compile(dynamic=False)  # One program a shape, as ours are.
        self.autocast = contextlib.nullcontext
        if "bf16" in options:
            self.autocast = functools.partial(torch.autocast, DEVICE, dtype=torch.bfloat16)
        self.parameters = [p for p in network.parameters() if p.requires_grad]
        self.average = [p.detach().clone() for p in self.parameters]
        self.optimizer = torch.optim.Adam(self.parameters, lr=work["learning_rate"], fused=True)
        height, width, channels = work["shape"]
        self.shape = work["batch"], channels, height, width
        images = np.random.default_rng(0).integers(0, 256, self.shape, np.uint8)
        self.images = torch.from_numpy(images).to(DEVICE)

    def describe(self) -> dict[str, Any]:
        """What is run, and on what."""
        versions = {"torch": torch.__version__}
        if self.kind.startswith("diffusers"):
            import diffusers

            versions["diffusers"] = diffusers.__version__
        else:
            from importlib.metadata import version

            versions["denoising-diffusion-pytorch"] = version("denoising-diffusion-pytorch")
        processor = f"cpu, {torch.get_num_threads()} threads"
        return {
            "parameters": sum(p.numel() for p in self.parameters),
            "versions": versions,
            "devices": torch.cuda.get_device_name() if DEVICE == "cuda" else processor,
            "platform": "gpu" if DEVICE == "cuda" else "cpu",
        }

    def loss(self, directory: str) -> float | None:
        """L_simple without dropout, at these weights, of the images, t and noise of inputs.npz."""
        if not isinstance(self.method, Diffusion):
            return None
        from safetensors.torch import load_file

        before = {k: v.clone() for k, v in self.method.network.state_dict().items()}
        self.method.network.load_state_dict(load_file(f"{directory}/{self.work['weights']}"))
        self.method.network.eval()
        inputs = np.load(f"{directory}/inputs.npz")

        def channels_first(x: np.ndarray) -> torch.Tensor:
            moved = torch.from_numpy(x).permute(0, 3, 1, 2).to(DEVICE)
            return moved.contiguous(memory_format=self.format)

        x0 = channels_first(inputs["images"]).float() / 127.5 - 1
        t = torch.from_numpy(inputs["t"]).long().to(DEVICE)
        with torch.inference_mode(), self.autocast():
            loss = float(self.method.losses(x0, t, channels_first(inputs["noise"])))
        self.method.network.load_state_dict(before)
        return loss

    def _step(self) -> None:
        images = self.images
        if self.work["flip"]:
            mirrored = torch.rand(len(images), 1, 1, 1, device=DEVICE) < 0.5
            images = torch.where(mirrored, images.flip(-1), images)
        with self.autocast():
            loss = self.method.loss((images.float() / 255).contiguous(memory_format=self.format))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, self.work["clip_norm"])
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(self.average, self.parameters, 1 - self.work["ema_decay"])

    def train(self, steps: int) -> float:
        """Seconds a training step, over so many."""
        self.method.network.train()
        start = time.perf_counter()
        for _ in range(steps):
            self._step()
        wait()
        return (time.perf_counter() - start) / steps

    def sample(self, steps: int) -> float:
        """Seconds a step of a chain of so many, ancestral."""
        self.method.network.eval()
        x = torch.randn(self.work["samples"], *self.shape[1:], device=DEVICE)
        x = x.contiguous(memory_format=self.format)
        start = time.perf_counter()
        with torch.inference_mode(), self.autocast():
            for t in range(steps, 0, -1):
                x = self.method.reverse(x, t)
        wait()
        return (time.perf_counter() - start) / steps

    def memory(self) -> int:
        """The largest number of bytes held: on an accelerator its own, else the process's."""
        return torch.cuda.max_memory_allocated() if DEVICE == "cuda" else peak_bytes()

    def matrix(self, n: int, products: int) -> float:
        """FLOP/s of so many products of n × n matrices, one after another: the best of ten."""
        dtype = torch.bfloat16 if "bf16" in self.kind else torch.float32
        a = torch.randn(n, n, device=DEVICE, dtype=dtype)  # As in `ours`.
        seconds = []
        for _ in range(11):
            start = time.perf_counter()
            for _ in range(products):
                a @ a
            wait()
            seconds.append(time.perf_counter() - start)
        return 2 * n**3 * products / min(seconds[1:])


def main() -> None:
    """Serves the workload of the command line."""
    peer = Peer(sys.argv[1], json.loads(sys.argv[2]))
    names = ("describe", "loss", "train", "sample", "memory", "matrix")
    serve({name: getattr(peer, name) for name in names})


if __name__ == "__main__":
    main()
