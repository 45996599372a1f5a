"""The training loop that none of the peers brings: distillation from the dense model, as Espalier trains by default."""

import torch
from torch.nn import functional


def train(model, teacher, batches, learning_rate, optimizer="adamw"):
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": 5e-4 if optimizer == "sgd" else 0.01},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if optimizer == "sgd":
        steps = torch.optim.SGD(groups, lr=learning_rate, momentum=0.9, nesterov=True)
    else:
        steps = torch.optim.AdamW(groups, lr=learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        steps, learning_rate, total_steps=len(batches) + 1, pct_start=0.15, div_factor=10, cycle_momentum=False
    )
    model.to(memory_format=torch.channels_last).train()
    teacher.to(memory_format=torch.channels_last).eval()
    for images, labels in batches:
        images = images.contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            target = functional.log_softmax(teacher(images) / 4, 1)
        answers = model(images)
        soft = functional.kl_div(functional.log_softmax(answers / 4, 1), target, reduction="batchmean", log_target=True)
        loss = 0.5 * functional.cross_entropy(answers, labels) + 0.5 * 16 * soft
        steps.zero_grad()
        loss.backward()
        steps.step()
        schedule.step()
    return model.to(memory_format=torch.contiguous_format).eval()
