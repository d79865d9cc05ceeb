"""What each method's gradient does, in pictures of few dimensions with exact scores: docs/how.md is made of them.

    python experiments/gradients.py                   # all pictures into docs/how/, 20 s on one core

The functions are the scripts' own. What stands in for a network is the exact velocity of a mixture of Gaussians; a
sample is a "video" [b, c, 1, 1, 1] of c numbers. The fake score is exact too: it is that of the student's own samples.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import torch
import tyro
from einops import rearrange
from matplotlib import pyplot as plt
from PIL import Image

import codmd
import common
import dmd2
import phased_dmd
from training.files import make_folder, written_aside
from training.flags import one_line_errors

matplotlib.use("Agg")
RED, BLUE, GREY = "#c1272d", "#0050a0", "#888888"


class Mixture:
    """A network whose velocity is exact: of data that are a mixture of Gaussians of one spread.

    means [k, c], spread a float; cond["weights"] [b, k] are the components' shares, so a prompt can name some of them.
    """

    def __init__(self, means, spread):
        self.means, self.variance = means, spread**2

    def posterior(self, x_t, sigma, cond):
        """Log density [b] of x_t [b, c, 1, 1, 1], and the mean [b, c] of x0 given it."""
        x, t = x_t.flatten(1), sigma[:, None]
        variance = (1 - t) ** 2 * self.variance + t**2  # [b, 1]
        off = x[:, None] - (1 - t)[..., None] * self.means  # [b, k, c]
        logits = cond["weights"].log() - off.square().sum(-1) / (2 * variance)
        log_density = torch.logsumexp(logits, -1) - x.shape[1] / 2 * (2 * math.pi * variance[:, 0]).log()
        towards = self.means + ((1 - t) * self.variance / variance)[..., None] * off
        return log_density, (torch.softmax(logits, -1)[..., None] * towards).sum(1)

    def __call__(self, x_t, sigma, cond):
        x0 = self.posterior(x_t, sigma, cond)[1].view_as(x_t)
        return (x_t - x0) / rearrange(sigma, "b -> b 1 1 1 1")

    def log_density(self, x, cond):
        """Of the data themselves, at x [b, c]."""
        return self.posterior(video(x), torch.zeros(len(x)), cond)[0]

    def draw(self, count, weights):
        rows = torch.multinomial(weights, count, replacement=True)
        return self.means[rows] + self.variance**0.5 * torch.randn(count, self.means.shape[1])


def video(x):
    return x[:, :, None, None, None]


def shares(weights, count):
    return {"weights": torch.as_tensor(weights).float().expand(count, -1)}


def even(count, components):
    return shares([1 / components] * components, count)


class Gaussian:
    """A student that knows one affine map of its noise, x0 = mean + A z: one mode is all that it can be."""

    def __init__(self, mean, spread):
        self.mean = torch.tensor(mean).requires_grad_()
        self.root = (spread * torch.eye(len(mean))).requires_grad_()

    def draw(self, count):
        return self.mean + torch.randn(count, len(self.mean)) @ self.root.T

    def x0(self, x_t, sigma):
        """The exact fake score: the mean of x0 given x_t, for its own samples."""
        with torch.no_grad():
            covariance = self.root @ self.root.T
            t, eye = sigma[:, None, None], torch.eye(len(self.mean))
            gain = (1 - t) * covariance @ torch.linalg.inv((1 - t) ** 2 * covariance + t**2 * eye)
            off = x_t.flatten(1) - (1 - sigma[:, None]) * self.mean
            return (self.mean + (gain @ off[..., None])[..., 0]).view_as(x_t)


def dmd_step(student, teacher, cond, null_cond, guidance, count, lr, high=0.98):
    """One step of the scripts for an affine student with its exact fake score; high: the largest score time."""
    x0 = video(student.draw(count))
    with torch.no_grad():
        sigma = dmd2.sample_sigma(SimpleNamespace(uniform=lambda: high * torch.rand(count)), 1.0)
        x_t = dmd2.add_noise(x0, torch.randn_like(x0), sigma)
        x0_teacher = dmd2.guided_x0(teacher, x_t, sigma, cond, null_cond, guidance)
        grad = dmd2.dmd_gradient(x0, x0_teacher, student.x0(x_t, sigma))
    loss = dmd2.student_loss(x0, grad) * x0.numel() / count
    parameters = [student.mean, student.root]
    for parameter, g in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        parameter.data -= lr * g


# ---------------------------------------------------------------------------------------------------- drawing


def panels(count, size=3.2, height=None):
    figure, axes = plt.subplots(1, count, figsize=(size * count, height or size), layout="constrained", squeeze=False)
    return figure, axes[0]


def density(axis, mixture, weights, reach=3.0):
    """Grey contours of a mixture in two dimensions."""
    line = torch.linspace(-reach, reach, 80)
    grid = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1)
    log = mixture.log_density(grid.view(-1, 2), shares(weights, 80 * 80)).view(80, 80)
    axis.contour(line, line, log.exp(), 5, colors=GREY, linewidths=0.7)
    axis.set(xlim=(-reach, reach), ylim=(-reach, reach), xticks=[], yticks=[], aspect="equal")


def save(figure, path):
    with written_aside(path) as aside:
        figure.savefig(aside, dpi=110, format="png")
    plt.close(figure)


def drawn(figure):
    """A figure as a picture."""
    figure.canvas.draw()
    size, pixels = figure.canvas.get_width_height(), figure.canvas.buffer_rgba().tobytes()
    plt.close(figure)
    return Image.frombytes("RGBA", size, pixels).convert("RGB")


def animate(pictures, path):
    """Write pictures as an animated WebP, eleven a second, the last one for two seconds."""
    durations = [90] * (len(pictures) - 1) + [2000]
    with written_aside(path) as aside:
        pictures[0].save(
            aside, "WebP", save_all=True, append_images=pictures[1:], duration=durations, loop=0, quality=80
        )


def rounded(x):
    """Numbers of a tensor, to two digits."""
    return [round(value, 2) for value in x.tolist()] if x.ndim else round(x.item(), 2)


# ---------------------------------------------------------------------------------------------------- pictures

TWO = Mixture(torch.tensor([[-1.2, 0.0], [1.2, 0.0]]), 0.35)


def mode_seeking(out):
    """A student of one mode, and a teacher of two: score times up to .98, and up to .4. Returns what each ends as."""
    figures, ends = [], {}
    students = {high: Gaussian([-0.6, 1.0], 0.4) for high in (0.98, 0.4)}
    for step in range(241):
        if step % 6 == 0:
            figure, axes = panels(2)
            for axis, (high, student) in zip(axes, students.items()):
                density(axis, TWO, [0.5, 0.5])
                torch.manual_seed(1)
                axis.scatter(*student.draw(300).detach().T, s=5, color=RED, alpha=0.6, linewidths=0)
                axis.set_title(f"score times to {high:g}, {step} steps", fontsize=9)
            figures.append(drawn(figure))
        torch.manual_seed(step)
        for high, student in students.items():
            dmd_step(student, TWO, even(256, 2), even(1, 2), 1.0, 256, lr=0.02, high=high)
    for high, student in students.items():
        x = student.draw(20000).detach()
        ends[high] = {
            "mean": rounded(x.mean(0)),
            "spread": rounded(x.std(0)),
            "in the right half": rounded((x[:, 0] > 0).float().mean()),
        }
    animate(figures, out / "mode_seeking.webp")
    return ends


def field(out):
    """The gradient's field over the plane, at three noise levels, for samples that all stand in the left mode. Returns
    its mean length where they stand.
    """
    figure, axes = panels(3)
    student, line, strength = Gaussian([-1.2, 0.0], 0.35), torch.linspace(-2.6, 2.6, 14), []
    places = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1).view(-1, 2)
    for axis, level in zip(axes, (0.9, 0.6, 0.3)):
        torch.manual_seed(0)
        x0 = video(places.repeat_interleave(200, 0))
        sigma = torch.full((len(x0),), level)
        x_t = dmd2.add_noise(x0, torch.randn_like(x0), sigma)
        cond = even(len(x0), 2)
        x0_teacher = dmd2.guided_x0(TWO, x_t, sigma, cond, even(1, 2), 1.0)
        down = (
            -(student.x0(x_t, sigma) - x0_teacher).view(-1, 200, 2).mean(1)
        )  # where a step goes, without the normaliser
        density(axis, TWO, [0.5, 0.5])
        axis.quiver(*places.T, *down.T, color=BLUE, angles="xy", width=0.004)
        axis.scatter(*student.draw(200).detach().T, s=4, color=RED, alpha=0.5, linewidths=0)
        axis.set_title(f"noise level {level}", fontsize=9)
        own = (places - student.mean.detach()).norm(dim=1) < 0.5
        strength.append(rounded(down[own].norm(dim=1).mean()))
    save(figure, out / "field.png")
    return strength


THREE = Mixture(torch.tensor([[-1.0, -0.6], [1.0, -0.6], [0.0, 1.1]]), 0.4)


def guidance(out):
    """A prompt names the upper of three modes: students after training with guidance 1, 2 and 4."""
    figure, axes = panels(3)
    ends = {}
    for axis, scale in zip(axes, (1.0, 2.0, 4.0)):
        student, cond = Gaussian([0.0, 0.6], 0.5), shares([1e-9, 1e-9, 1.0], 512)
        for step in range(400):
            torch.manual_seed(step)
            dmd_step(student, THREE, cond, even(1, 3), scale, 512, lr=0.01)
        x = student.draw(4000).detach()
        density(axis, THREE, [1 / 3] * 3)
        axis.scatter(*x[:300].T, s=5, color=RED, alpha=0.6, linewidths=0)
        ends[scale] = {"mean": rounded(x.mean(0)), "spread": rounded(x.std(0))}
        axis.set_title(f"guidance {scale:g}", fontsize=9)
    save(figure, out / "guidance.png")
    return ends


def data_forcing(out):
    """DFD's line: the teacher reads noised data in place of the noised sample. Data N(0, 1) in 64 dimensions, a student
    that scales its input by theta. Returns the samples' spread in the end.
    """
    width, count, level = 64, 512, 0.8
    one, cond, null_cond = Mixture(torch.zeros(1, width), 1.0), even(count, 1), even(1, 1)
    figure, axes = panels(2, 4.4, 3)
    ways = {
        "DMD": (False, False, GREY),
        "DFD, input noise": (True, False, RED),
        "DFD, input the clip, noised": (True, True, BLUE),
    }
    ends = {}
    for name, (forced, paired, color) in ways.items():
        theta, spreads = torch.tensor(1.0, requires_grad=True), []
        for step in range(240):
            torch.manual_seed(step)
            data, noise, eps = (video(torch.randn(count, width)) for _ in range(3))
            start = dmd2.add_noise(data, noise, torch.full((count,), level)) if paired else noise
            x0 = theta * start
            with torch.no_grad():
                sigma = dmd2.sample_sigma(SimpleNamespace(uniform=lambda: torch.rand(count)), 1.0)
                x_t = dmd2.add_noise(x0, eps, sigma)
                own = Mixture(torch.zeros(1, width), x0.std().item())
                x0_fake = dmd2.predict_x0(own, x_t, sigma, cond)
                x_t = dmd2.add_noise(data, eps, sigma) if forced else x_t  # DFD's line
                grad = dmd2.dmd_gradient(x0, dmd2.guided_x0(one, x_t, sigma, cond, null_cond, 1.0), x0_fake)
            loss = dmd2.student_loss(x0, grad)
            theta.data -= 0.05 * torch.autograd.grad(loss, theta)[0]
            spreads.append(x0.std().item())
        ends[name] = round(spreads[-1], 2)
        axes[0].plot(spreads, color=color, label=name)
        if forced:
            axes[1].scatter(data[0].flatten(), x0.detach()[0].flatten(), s=10, color=color)
    axes[0].set(xlabel="steps", ylabel="spread of the samples (data: 1)", ylim=(0, 1.4))
    axes[1].set(xlabel="a number of the clip", ylabel="the same of the student's sample", ylim=(-2.5, 2.5))
    axes[0].legend(frameon=False, fontsize=8)
    save(figure, out / "data_forcing.png")
    return ends


def relations(out):
    """CoDMD's targets for six samples of two modes: the student's relations, the target, and where its loss pushes."""
    torch.manual_seed(4)
    common.init_distributed()
    x0 = torch.cat([TWO.draw(3, torch.tensor([1.0, 0.0])) * 0.6, TWO.draw(3, torch.tensor([0.0, 1.0])) * 0.6])
    x0 = (x0 + torch.tensor([0.0, 0.9])).requires_grad_()
    sigma = torch.full((6,), 0.5)
    student = Gaussian([0.0, 0.9], 0.7)
    x_t = dmd2.add_noise(video(x0.detach()), video(torch.randn(6, 2)), sigma)
    x0_teacher, x0_fake = dmd2.guided_x0(TWO, x_t, sigma, even(6, 2), even(1, 2), 1.0), student.x0(x_t, sigma)
    loss = codmd.relation_loss(video(x0), x0_teacher, x0_fake, 1.0, 0.0, 0.5)
    push = -torch.autograd.grad(loss, x0)[0]
    s, r, f = (codmd.relation_matrix(x.flatten(1)) for x in (video(x0).detach(), x0_teacher, x0_fake))
    figure, axes = panels(3)
    for axis, matrix, name in ((axes[0], s, "student's cosines"), (axes[1], (s - (f - r)), "moved from fake to real")):
        axis.imshow(matrix, cmap="RdBu_r", vmin=-2, vmax=2)
        axis.set_title(name, fontsize=9)
        axis.set(xticks=[], yticks=[])
        for i in range(6):
            for j in range(6):
                axis.text(j, i, f"{matrix[i, j]:.1f}", ha="center", va="center", fontsize=7)
    density(axes[2], TWO, [0.5, 0.5])
    axes[2].scatter(*x0.detach().T, s=14, color=RED)
    axes[2].quiver(*x0.detach().T, *push.T, color=BLUE, angles="xy", width=0.006)
    axes[2].axhline(0, color=GREY, linewidth=0.4)
    axes[2].axvline(0, color=GREY, linewidth=0.4)
    axes[2].set_title("where the loss pushes", fontsize=9)
    save(figure, out / "relations.png")
    # a cosine does not know a length: no push along a sample's own direction, in any row
    along = (push * x0.detach()).sum(1) / x0.detach().norm(dim=1) / push.norm(dim=1)
    return f"largest share of a push along its sample {along.abs().max():.1g}"


def anchors(out):
    """Phased DMD: samples are known at level s only. What minimises its loss at level t, with its target and with the
    naive one, as if x_s were clean, against the exact answer; one dimension, two modes. Returns the mean errors.
    """
    torch.manual_seed(0)
    data, s, t, count = Mixture(torch.tensor([[-1.0], [1.0]]), 0.2), 0.5, 0.65, 400_000
    x0 = video(data.draw(count, torch.tensor([0.5, 0.5])))
    x_s = phased_dmd.add_noise(x0, torch.randn_like(x0), torch.full((count,), s))
    noise, sigma = torch.randn_like(x_s), torch.full((count,), t)
    x_t = phased_dmd.renoise(x_s, noise, sigma, s)
    edges = torch.linspace(-2.2, 2.2, 45)
    bins, middles = torch.bucketize(x_t.flatten(), edges), (edges[1:] + edges[:-1]) / 2
    curves = {}
    for name, level in (("its target", s), ("naive target", 0)):
        table = torch.zeros(len(edges) + 1, requires_grad=True)
        optimizer = torch.optim.LBFGS([table], max_iter=40)

        def closure(table=table, level=level, optimizer=optimizer):
            optimizer.zero_grad()
            loss = phased_dmd.flow_loss(video(table[bins][:, None]), x_s, noise, sigma, level)
            loss.backward()
            return loss

        optimizer.step(closure)
        curves[name] = table.detach()[1:-1]
    level = torch.full((len(middles),), t)
    exact = data(video(middles[:, None]), level, even(len(middles), 2)).flatten()
    figure, (axis,) = panels(1, 4.8, 3)
    lines = {"exact": (exact, GREY, 5), "Phased DMD's target": (curves["its target"], BLUE, 1.5)}
    lines["naive target"] = curves["naive target"], RED, 1.5
    for name, (v, color, width) in lines.items():
        axis.plot(middles, middles - t * v, color=color, linewidth=width, label=name)
    axis.set(xlabel=f"x_t at level {t}", ylabel="predicted x0")
    axis.legend(frameon=False, fontsize=8)
    save(figure, out / "anchors.png")
    inner = middles.abs() < 1.2
    return {name: rounded(t * (curve - exact)[inner].abs().mean()) for name, curve in curves.items()}


def discriminator(out):
    """The GAN's gradient at an optimal discriminator, beside DMD's, for samples that have dropped the right mode."""
    student, line = Gaussian([-1.2, 0.0], 0.35), torch.linspace(-2.6, 2.6, 14)
    places = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1).view(-1, 2).requires_grad_()
    own = Mixture(student.mean.detach()[None], 0.35)
    figure, axes = panels(3)
    for axis, level in zip(axes, (0.9, 0.6, 0.3)):
        sigma, count = torch.full((len(places),), level), len(places)
        x_t = video(places) * (1 - level)  # the noise's mean
        real, _ = TWO.posterior(x_t, sigma, even(count, 2))
        fake, _ = own.posterior(x_t, sigma, even(count, 1))
        down = -torch.autograd.grad(dmd2.gan_student_loss(real - fake) * count, places)[0]
        density(axis, TWO, [0.5, 0.5])
        axis.quiver(*places.detach().T, *down.T, color=BLUE, angles="xy", width=0.004)
        axis.scatter(*student.draw(200).detach().T, s=4, color=RED, alpha=0.5, linewidths=0)
        axis.set_title(f"noise level {level}", fontsize=9)
    save(figure, out / "discriminator.png")


PICTURES = [field, mode_seeking, guidance, data_forcing, relations, anchors, discriminator]


@dataclass(kw_only=True)
class Args:
    out: Path = Path(__file__).resolve().parents[1] / "docs" / "how"
    """Folder for the pictures."""


def main(args):
    make_folder(args.out, hint="; see --out")
    torch.set_num_threads(1)
    for picture in PICTURES:
        print(f"{picture.__name__}: {picture(args.out)}", flush=True)


if __name__ == "__main__":
    with one_line_errors():
        main(tyro.cli(Args, description=__doc__))
