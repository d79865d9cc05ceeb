"""What each method's gradient does, in pictures of few dimensions with exact scores: docs/how.md is made of them.

    python experiments/gradients.py                   # all pictures into docs/how/, 25 s of one core

The functions are the scripts' own. What stands in for a network is the exact velocity of a mixture of Gaussians; a
sample is a "video" [b, c, 1, 1, 1] of c numbers. The fake score is exact too: it is that of the student's own samples.
"""

from pathlib import Path
from types import SimpleNamespace

import matplotlib
import torch
import tyro
from matplotlib import pyplot as plt
from matplotlib.animation import PillowWriter

import dmd2

matplotlib.use("Agg")
plt.rcParams["font.size"] = 12
OUT = Path(__file__).resolve().parents[1] / "docs" / "how"
RED, BLUE, GREY = "#c1272d", "#0050a0", "#888888"


def video(x):
    return x[:, :, None, None, None]


class Mixture:
    """A network whose velocity is exact: of data that are a mixture of Gaussians of one spread.

    means [k, c], spread a float or [c]; cond["weights"] [b, k] are the components' shares, even where there are none.
    """

    def __init__(self, means, spread):
        self.means, self.spread = torch.as_tensor(means), torch.as_tensor(spread)

    def posterior(self, x_t, sigma, cond):
        """Log density [b] of x_t [b, c, 1, 1, 1], and the mean [b, c] of x0 given it."""
        x, t = x_t.flatten(1)[:, None], sigma[:, None, None]
        variance = ((1 - t) * self.spread) ** 2 + t**2
        normal = torch.distributions.Normal((1 - t) * self.means, variance.sqrt().expand(-1, *self.means.shape))
        log = normal.log_prob(x).sum(-1) + cond.get("weights", torch.ones(len(self.means)) / len(self.means)).log()
        x0 = self.means + (1 - t) * self.spread**2 / variance * (x - (1 - t) * self.means)  # [b, k, c], of each
        return torch.logsumexp(log, -1), (torch.softmax(log, -1)[..., None] * x0).sum(1)

    def __call__(self, x_t, sigma, cond):
        x0 = self.posterior(x_t, sigma, cond)[1].view_as(x_t)
        return (x_t - x0) / video(sigma[:, None]), []

    def draw(self, count):
        noise, rows = torch.randn(count, self.means.shape[1]), torch.randint(len(self.means), (count,))
        return self.means[rows] + self.spread * noise


def uniform_sigma(count, high=0.98):
    return dmd2.sample_sigma(SimpleNamespace(uniform=lambda: high * torch.rand(count)), 1.0)


def dmd_step(student, teacher, guided, lr, count, high=0.98):
    """A step of the scripts for a student of one mode and its exact fake score. guided: cond, null_cond, guidance."""
    parameters = [student.means.requires_grad_(), student.spread.requires_grad_()]
    x0 = video(student.means + student.spread * torch.randn(count, 2))
    with torch.no_grad():
        sigma = uniform_sigma(count, high)
        x_t = dmd2.add_noise(x0, torch.randn_like(x0), sigma)
        x0_fake = dmd2.predict_x0(student, x_t, sigma, {})
        grad = dmd2.dmd_gradient(x0, dmd2.guided_x0(teacher, x_t, sigma, *guided), x0_fake)
    loss = dmd2.student_loss(x0, grad) * x0.numel() / count
    for parameter, g in zip(parameters, torch.autograd.grad(loss, parameters)):
        parameter.data -= lr * g


def panels(count, width=2.5, height=2.95):
    figure, axes = plt.subplots(1, count, figsize=(width * count, height), layout="constrained", squeeze=False)
    return figure, axes[0]


def plane(axis, title, mixture, samples, size=5, low=-3.3):
    """Grey contours of a mixture in two dimensions, and samples."""
    line = torch.linspace(-3.3, 3.3, 80)
    grid = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1).view(-1, 2)
    log = mixture.posterior(video(grid), torch.zeros(len(grid)), {})[0].view(80, 80)
    axis.contour(line, line, log.exp(), 5, colors=GREY, linewidths=0.7)
    axis.plot([], [], color=GREY, label="teacher")  # contours have no label
    axis.set(xlim=(-3.3, 3.3), ylim=(low, low + 6.6), xticks=[], yticks=[], aspect="equal")
    axis.set_title(title)
    axis.scatter(*samples.detach().T, s=size, color=RED, alpha=0.6, linewidths=0, label="student")


def legend(figure, columns=3):
    handles = figure.axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=columns, frameon=False, handlelength=1, markerscale=2)


def save(figure, path, columns=3):
    legend(figure, columns)
    figure.savefig(path, dpi=110)
    plt.close(figure)


TWO = Mixture([[-1.2, 0.0], [1.2, 0.0]], 0.35)
LEFT = Mixture([[-1.2, 0.0]], 0.35)
THREE = Mixture([[-1.0, -0.6], [1.0, -0.6], [0.0, 1.1]], 0.4)
UPPER, ANY = {"weights": torch.eye(3)[2:].add(1e-9)}, {"weights": torch.ones(1, 3) / 3}
PLACES = torch.cartesian_prod(*[torch.linspace(-2.6, 2.6, 14)] * 2).flip(1)


def field(out):
    """The gradient's field over the plane, at three noise levels, for samples that all stand in the left mode. Returns
    its mean length where they stand.
    """
    (figure, axes), strength = panels(3), []
    for axis, level in zip(axes, (0.9, 0.6, 0.3)):
        torch.manual_seed(0)
        x0 = video(PLACES.repeat_interleave(200, 0))
        sigma = torch.full((len(x0),), level)
        x_t = dmd2.add_noise(x0, torch.randn_like(x0), sigma)
        grad = dmd2.predict_x0(LEFT, x_t, sigma, {}) - dmd2.predict_x0(TWO, x_t, sigma, {})  # without the normaliser
        down = -grad.view(-1, 200, 2).mean(1)
        plane(axis, f"noise level {level}", TWO, LEFT.draw(200))
        axis.quiver(*PLACES.T, *down.T, color=BLUE, angles="xy", width=0.005)
        axis.plot([], [], color=BLUE, marker=">", label="its push")  # a quiver's own label is a patch
        strength.append(down[(PLACES - LEFT.means).norm(dim=1) < 0.5].norm(dim=1).mean())
    save(figure, out / "field.png")
    return strength


def mode_seeking(out):
    """A student of one mode, and a teacher of two: score times up to .98, and up to .4. Returns what each ends as."""
    students = {high: Mixture([[-0.6, 1.0]], [0.4, 0.4]) for high in (0.98, 0.4)}
    (figure, axes), writer, ends = panels(2), PillowWriter(fps=11), {}
    with writer.saving(figure, out / "mode_seeking.webp", dpi=100):
        for step in range(241):
            if step % 6 == 0:
                for axis, (high, student) in zip(axes, students.items()):
                    torch.manual_seed(1)
                    axis.clear()
                    plane(axis, f"up to {high:g}, step {step}", TWO, student.draw(300))
                if step == 0:
                    legend(figure)
                writer.grab_frame()
            torch.manual_seed(step)
            for high, student in students.items():
                dmd_step(student, TWO, ({}, {}, 1.0), 0.02, 256, high)
    for high, student in students.items():
        x = student.draw(20000).detach()
        right = (x[:, 0] > 0).float().mean()
        ends[high] = {"mean": x.mean(0), "spread": x.std(0), "in the right half": right}
    return ends


def guidance(out):
    """A prompt names the upper of three modes: students after training with guidance 1, 2 and 4."""
    teacher, cond, null_cond = THREE, {"weights": UPPER["weights"].expand(512, 3)}, ANY
    (figure, axes), ends = panels(3), {}
    for axis, scale in zip(axes, (1.0, 2.0, 4.0)):
        student = Mixture([[0.0, 0.6]], [0.5, 0.5])
        for step in range(400):
            torch.manual_seed(step)
            dmd_step(student, teacher, (cond, null_cond, scale), 0.01, 512)
        x = student.draw(4000).detach()
        plane(axis, f"guidance {scale:g}", teacher, x[:300], low=-2)
        ends[scale] = {"mean": x.mean(0), "spread": x.std(0)}
    save(figure, out / "guidance.png")
    return ends


def data_forcing(out):
    """DFD's line: the teacher reads noised data in place of the noised sample. Data N(0, 1) in 64 dimensions, a student
    that scales its input by theta. Returns the samples' spread in the end.
    """
    (figure, (axis,)), ends, zero, count = panels(1, 4.4, 4), {}, torch.zeros(1, 64), 512
    for name, forced, paired, color in (
        ("DMD", False, False, GREY),
        ("DFD, input noise", True, False, RED),
        ("DFD, input the clip, noised", True, True, BLUE),
    ):
        theta, spreads = torch.tensor(1.0, requires_grad=True), []
        for step in range(240):
            torch.manual_seed(step)
            data, noise, eps = (video(torch.randn(count, 64)) for _ in range(3))
            x0 = theta * (dmd2.add_noise(data, noise, torch.full((count,), 0.8)) if paired else noise)
            spreads.append(x0.std().item())
            with torch.no_grad():
                sigma = uniform_sigma(count)
                x_t = dmd2.add_noise(x0, eps, sigma)
                x0_fake = dmd2.predict_x0(Mixture(zero, spreads[-1]), x_t, sigma, {})
                x_t = dmd2.add_noise(data, eps, sigma) if forced else x_t  # DFD's line
                grad = dmd2.dmd_gradient(x0, dmd2.predict_x0(Mixture(zero, 1.0), x_t, sigma, {}), x0_fake)
            theta.data -= 0.05 * torch.autograd.grad(dmd2.student_loss(x0, grad), theta)[0]
        ends[name] = f"{spreads[-1]:.2f}"
        axis.plot(spreads, color=color, label=name)
    axis.set(xlabel="steps", ylabel="spread (data: 1)", ylim=(0, 1.1))
    save(figure, out / "data_forcing.png", columns=1)
    return ends


def main(out: Path = OUT):
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    torch.set_printoptions(precision=2, sci_mode=False)
    for picture in (field, mode_seeking, guidance, data_forcing):
        print(f"{picture.__name__}: {picture(out)}".replace("tensor(", "").replace(")", ""), flush=True)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
