"""Networks whose answers are known exactly, for the tests of the mathematics."""

import torch
from torch import nn

import common
from models.wan import Wan

COND = {"text": torch.zeros(1, 1, 1)}


class Grid:
    """Stands in for common.SampleRNG where the expectation over u is wanted: u on a fine grid."""

    def __init__(self, n):
        self.n = n

    def uniform(self):
        return (torch.arange(self.n) + 0.5) / self.n


class Whole(nn.Module):
    """A network that denoises all frames at once."""

    chunks, update_cache = Wan.chunks, Wan.update_cache


class Gaussian(Whole):
    """The exact velocity for data N(mean, std^2) in every dimension."""

    def __init__(self, mean, std):
        super().__init__()
        self.mean, self.std = mean, std

    def forward(self, x_t, sigma, cond, blocks=()):
        s = sigma.view(-1, 1, 1, 1, 1)
        a, var = 1 - s, self.std**2
        x0 = self.mean + a * var / (a**2 * var + s**2) * (x_t - a * self.mean)  # E[x0 | x_t]
        return (x_t - x0) / s, []


class ScaleShift(Whole):
    """A one-step student x0 = theta * z + mu, as a velocity network."""

    def __init__(self, theta, mu):
        super().__init__()
        self.theta, self.mu = nn.Parameter(torch.tensor(theta)), nn.Parameter(torch.tensor(mu))

    def forward(self, x_t, sigma, cond, blocks=()):
        return x_t - (self.theta * x_t + self.mu), []


def draws(stream, n):
    return common.SampleRNG(0, stream, range(n), torch.device("cpu"))
