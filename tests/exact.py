"""Networks whose answers are known exactly, for the tests of the mathematics."""

import torch
from torch import nn

import common
from models.wan import Wan

COND = {"text": torch.zeros(1, 1, 1)}


def column(x):
    return x.view(-1, 1, 1, 1, 1)


class Grid:
    """Stands in for common.SampleRNG: u on a fine grid, where its expectation is wanted; noise by torch's global seed,
    where speed matters.
    """

    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def uniform(self):
        return (torch.arange(self.n) + 0.5) / self.n

    def normal(self, shape):
        return torch.randn(self.n, *shape)


class Exact(nn.Module):
    """A network by its x0(x_t, sigma), with sigma [b, 1, 1, 1, 1]."""

    chunks, update_cache = Wan.chunks, Wan.update_cache

    def forward(self, x_t, sigma, cond, blocks=()):
        return (x_t - self.x0(x_t, column(sigma))) / column(sigma), []


class Gaussian(Exact):
    """The exact velocity for data N(mean, std^2) in every dimension."""

    def __init__(self, mean, std):
        super().__init__()
        self.mean, self.std = mean, std

    def x0(self, x_t, s):
        a, var = 1 - s, self.std**2
        return self.mean + a * var / (a**2 * var + s**2) * (x_t - a * self.mean)  # E[x0 | x_t]


class ScaleShift(Exact):
    """A student that predicts theta * z + mu at noise level 1, as a velocity network."""

    def __init__(self, theta, mu=0.0):
        super().__init__()
        self.theta, self.mu = nn.Parameter(torch.tensor(theta)), nn.Parameter(torch.tensor(mu))

    def x0(self, x_t, s):
        return x_t - s * (x_t - self.theta * x_t - self.mu)


def draws(stream, n):
    return common.SampleRNG(0, stream, range(n), torch.device("cpu"))
