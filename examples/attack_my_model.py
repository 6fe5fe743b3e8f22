"""Attack a gradient of a model of your own: put your module and your files in place of the toy ones below.

Run it as it is, or as: python attack_my_model.py GRADIENT.safetensors WEIGHTS.safetensors
"""

import sys
import tempfile
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from gradleak import DLG, Architecture, Model, Observation, load, replay

folder = Path(tempfile.mkdtemp(prefix="gradleak-"))
known = load("embedded", "test", indices=[0], resize=(16, 16))  # the batch behind the gradient, to check the set-up
torch.manual_seed(0)
module = nn.Sequential(nn.Conv2d(3, 8, 5, stride=2, padding=2), nn.Sigmoid(), nn.Flatten(), nn.Linear(8 * 8 * 8, 10))

if len(sys.argv) == 3:
    gradient = load_file(sys.argv[1])  # {parameter name: gradient}
    module.load_state_dict(load_file(sys.argv[2]))
else:  # what a training loop of yours would have written
    loss, parameters = nn.functional.cross_entropy(module(known.images), known.labels), dict(module.named_parameters())
    gradients = torch.autograd.grad(loss, list(parameters.values()))
    save_file(dict(zip(parameters, gradients, strict=True)), folder / "gradient.safetensors")
    gradient = load_file(folder / "gradient.safetensors")

model = Model.of(module, Architecture("mine", (3, 16, 16), classes=10), mode="eval")
observation = Observation(model=model, released=gradient, batch_size=1)
print(replay(observation, known.images, known.labels)[0]["sentence"])
found = DLG()(observation, generator=torch.Generator().manual_seed(0))
print(found.status, "Labels:", found.labels)
for number, image in enumerate((255 * found.value).round().byte()):  # (channel, height, width), channels 3
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"image-{number}.png")
print("Pictures in", folder)
