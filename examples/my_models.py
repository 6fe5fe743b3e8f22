"""A module of your own, for `--model my_models:build`. Run as a program, it writes what a training loop of yours would have left:
gradient.safetensors, weights.safetensors, and the weights before and after a step of a federated client, sent.npz and received.npz.
"""

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from gradleak import load


def build(input_shape: tuple[int, int, int], classes: int) -> nn.Module:
    """Maps pixels in [0, 1], (batch, channel, height, width), to logits (batch, classes)."""
    channels, height, width = input_shape
    features = 8 * (height // 2) * (width // 2)
    return nn.Sequential(
        nn.Conv2d(channels, 8, 5, stride=2, padding=2), nn.Sigmoid(), nn.Flatten(), nn.Linear(features, classes)
    )


if __name__ == "__main__":
    torch.manual_seed(0)
    module, private = build((3, 16, 16), 10), load("embedded", "test", indices=[0], resize=(16, 16))
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    loss, parameters = (
        nn.functional.cross_entropy(module(private.images), private.labels),
        dict(module.named_parameters()),
    )
    gradients = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
    save_file(gradients, "gradient.safetensors")
    save_file(before, "weights.safetensors")
    sent = {name: tensor.numpy() for name, tensor in before.items()}
    received = {name: (tensor - 0.01 * gradients[name]).numpy() for name, tensor in before.items()}
    np.savez("sent.npz", **sent)
    np.savez("received.npz", **received)
