"""ARD, RSLAD and AdaAD, each with or without IGDM, and GACD with gathered banks, one eager step at a time.

Eager float32 in the default memory format, a `DataLoader` with torchvision transforms, an attack that calls
`loss.backward()` and so computes the gradients of all weights too, and a forward pass of its own for every term.
Given the initial weights, the batch and the start noise of the engine, it takes the engine's steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

EPSILON, STEP_SIZE, STEPS = 8 / 255, 2 / 255, 10


def kl(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """KL(softmax p || softmax q), mean over samples."""
    return F.kl_div(F.log_softmax(q_logits, dim=1), F.softmax(p_logits, dim=1), reduction="batchmean")


class GACD(nn.Module):
    """The "strict" estimator with every bank row gathered: -(w/B) [log h(t_i, s_i) + sum_j log(1 - h(t_i, s_j))].

    Negatives are the other-class students of the batch first, then bank rows until there are `k`.
    `draw(index)` gives (B, k) bank rows of other classes; by default `torch.randint` over each anchor's own list.
    """

    def __init__(
        self,
        student_head: nn.Module,
        teacher_head: nn.Module,
        bank: Tensor,  # (M, D)
        labels: Tensor,  # (M,)
        *,
        k: int,
        weight: float = 0.8,
        temperature: float = 0.07,
        momentum: float = 0.5,
        draw: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.student_head, self.teacher_head = student_head, teacher_head
        self.bank, self.labels, self.k = bank, labels, k
        self.weight, self.temperature, self.momentum = weight, temperature, momentum
        self.others = [(labels != c).nonzero()[:, 0] for c in range(int(labels.max()) + 1)]
        self.draw = draw or self._draw
        self.normalizer = None

    def _draw(self, index: Tensor) -> Tensor:
        rows = []
        for i in index:
            others = self.others[int(self.labels[i])]
            rows.append(others[torch.randint(len(others), (self.k,), device=others.device)])
        return torch.stack(rows)

    def forward(self, student_features, teacher_features, teacher_logits, y, index) -> Tensor:
        s = F.normalize(self.student_head(student_features), dim=1)
        t = F.normalize(self.teacher_head(teacher_features), dim=1)
        confidence = F.softmax(teacher_logits, dim=1).gather(1, y[:, None])[:, 0]
        other = y[:, None] != y[None, :]
        table = self.draw(index)
        kept = torch.arange(self.k, device=y.device) < (self.k - other.sum(1, keepdim=True))
        fresh = (t @ s.T / self.temperature).exp()
        stored = (torch.bmm(self.bank[table], t[:, :, None])[:, :, 0] / self.temperature).exp()
        positive = fresh.diagonal()
        if self.normalizer is None:
            scores = torch.cat([positive, fresh[other], stored[kept]])
            self.normalizer = scores.mean().item() * len(self.labels)

        def h(e: Tensor) -> Tensor:
            return e / self.normalizer / (e / self.normalizer + self.k / len(self.labels))

        per_sample = h(positive).log() + ((1 - h(fresh)).log() * other).sum(1) + ((1 - h(stored)).log() * kept).sum(1)
        with torch.no_grad():
            rows = self.momentum * self.bank[index] + (1 - self.momentum) * s
            self.bank[index] = F.normalize(rows, dim=1)
        return -self.weight * (confidence * per_sample).mean()


class Reference:
    """A student and its optimiser; `step` trains on one batch.

    igdm: alpha of the IGDM term, 0 for none. `attack_gradient` "grad" asks autograd for the input gradient alone, as
    some of the published attacks do; "backward" is the common form.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        method: Literal["ard", "rslad", "adaad"],
        *,
        igdm: float = 0.0,
        gacd: GACD | None = None,
        epochs: int = 200,
        lr: float = 0.1,
        rslad_scale: float = 1.0,
        attack_gradient: Literal["backward", "grad"] = "backward",
    ) -> None:
        self.student, self.teacher, self.method = student, teacher.eval(), method
        self.igdm, self.gacd, self.epochs, self.rslad_scale = igdm, gacd, epochs, rslad_scale
        self.attack_gradient = attack_gradient
        parameters = [*student.parameters(), *(gacd.parameters() if gacd else ())]
        self.optimizer = torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=5e-4)

    def attack(self, x: Tensor, y: Tensor, noise: Tensor | None = None) -> Tensor:
        """noise: what is added to x to start from; drawn here by default."""
        self.student.eval()
        if noise is None:
            uniform = torch.empty_like(x).uniform_(-EPSILON, EPSILON)
            noise = uniform if self.method == "ard" else 0.001 * torch.randn_like(x)
        x_adv = x + noise
        if self.method == "ard":
            x_adv = x_adv.clamp(0, 1)
        for _ in range(STEPS):
            x_adv = x_adv.detach().requires_grad_()
            if self.method == "ard":
                loss = F.cross_entropy(self.student(x_adv), y)
            elif self.method == "rslad":
                with torch.no_grad():
                    target = self.teacher(x)
                loss = kl(target, self.student(x_adv))
            else:
                loss = kl(self.teacher(x_adv), self.student(x_adv))
            if self.attack_gradient == "backward":
                loss.backward()
                gradient = x_adv.grad
            else:
                (gradient,) = torch.autograd.grad(loss, x_adv)
            x_adv = x_adv.detach() + STEP_SIZE * gradient.sign()
            x_adv = torch.min(torch.max(x_adv, x - EPSILON), x + EPSILON).clamp(0, 1)
        return x_adv.detach()

    def step(self, x: Tensor, y: Tensor, index: Tensor, *, epoch: int = 1, noise: Tensor | None = None) -> float:
        """One step of training; returns the loss."""
        x_adv = self.attack(x, y, noise)
        self.student.train()
        self.optimizer.zero_grad()
        student, features = self.student(x_adv, features=True)
        if self.method == "ard":
            with torch.no_grad():
                target = self.teacher(x)
            loss = kl(target, student)
        elif self.method == "rslad":
            with torch.no_grad():
                target = F.softmax(self.teacher(x), dim=1)
            adversarial = F.kl_div(F.log_softmax(student, dim=1), target, reduction="none")
            clean = F.kl_div(F.log_softmax(self.student(x), dim=1), target, reduction="none")
            loss = self.rslad_scale * (5 / 6 * adversarial + 1 / 6 * clean).mean()
        else:
            with torch.no_grad():
                target = self.teacher(x_adv)
            loss = kl(target, student)
        if self.igdm:
            mirror = x - (x_adv - x)
            with torch.no_grad():
                difference = self.teacher(x_adv) - self.teacher(mirror)
            loss = loss + self.igdm * epoch / self.epochs * kl(difference, student - self.student(mirror))
        if self.gacd is not None:
            with torch.no_grad():
                teacher_logits, teacher_features = self.teacher(x_adv, features=True)
            loss = loss + self.gacd(features, teacher_features, teacher_logits, y, index)
        loss.backward()
        self.optimizer.step()
        return loss.item()


class _Indexed(Dataset):
    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels  # uint8 (N, H, W, C), int64 (N,)
        self.transform = transforms.Compose(
            [
                transforms.ToPILImage(),
                transforms.RandomCrop(images.shape[1], padding=4 * images.shape[1] // 32),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
            ]
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor, int, int]:
        return self.transform(self.images[i].numpy()), int(self.labels[i]), i


def loader(images: Tensor, labels: Tensor, *, batch_size: int) -> DataLoader:
    """Shuffled batches (x, y, index) of images cropped and flipped by torchvision, x float32 in [0, 1]."""
    return DataLoader(_Indexed(images, labels), batch_size, shuffle=True, drop_last=True)
