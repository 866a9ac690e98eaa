"""One training step with the installed package, for a wheel: `python tests/smoke.py` in a folder without the sources."""

import platform
from pathlib import Path

import torch

import lora_kernels as lk
from lora_kernels.backends import native

assert not Path(lk.__file__).parent.with_name("setup.py").exists(), "the package is not the installed one"
module = native.extension()  # raises if the wheel has no compiled module for this torch and Python
maps = Path("/proc/self/maps")
if maps.exists():
    openmp = {line.split()[-1] for line in maps.read_text().splitlines() if "libgomp" in line or "libomp" in line}
    assert len(openmp) == 1, f"torch and the compiled module must share one OpenMP: {openmp}"

model = torch.nn.Sequential(torch.nn.Linear(256, 128), torch.nn.SiLU(), torch.nn.Linear(128, 64))
lk.apply_qlora(model, r=8)
assert lk.verify(model, strict=True).rows
optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
x, target = torch.randn(32, 256), torch.randn(32, 64)
losses = []
for _ in range(5):
    loss = torch.nn.functional.mse_loss(model(x), target)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
assert losses[-1] < losses[0], losses
print(
    f"lora_kernels {lk.__version__} from {Path(lk.__file__).parent}: Python {platform.python_version()}, torch "
    f"{torch.__version__}, native level {module.cpu_level()}, loss {losses[0]:.3f} -> {losses[-1]:.3f}"
)
