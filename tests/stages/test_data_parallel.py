"""Fine-tuning by two processes on this machine's CPU, which takes the same path as two GPUs but for NCCL."""

import os
import subprocess
import sys
import time

import pytest
import torch
from places import PYTHONPATH
from torch import nn
from torch.nn import functional

import compress
from compress import models, processes, training
from compress.data.batches import iter_numbered_batches
from compress.errors import RequestError, TrainingError
from compress.stages import data_parallel, steps
from compress.workload import open_workload

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A run's folder with what fine-tuning starts from; nothing was prepared, which training does not ask."""
    folder = tmp_path_factory.mktemp("run")
    source = open_workload(compress.Request())
    for name in ("baseline", "shrunk"):
        how = {"preprocessing": source.preprocessing, "class_names": source.class_names}
        models.save(source.model, folder / "stages" / name, architecture=source.architecture, **how)
    return folder


def ask(**changes):
    return compress.Request(**{"training_processes": 2, "finetune_epochs": 0.1} | changes)


def fine_tuned(folder, request, progress=lambda fraction, text: None):
    model = models.rebuild(folder / "stages" / "shrunk")
    return model, data_parallel.fine_tune(request, folder, model, progress)


def test_two_processes_train_one_model(prepared):
    told = []
    before = models.rebuild(prepared / "stages" / "shrunk").state_dict()
    model, curve = fine_tuned(prepared, ask(), lambda fraction, text: told.append((fraction, text)))
    assert [record["epoch"] for record in curve] == [1] and curve[0]["accuracy"] > 0.8
    assert told and told[-1][0] <= 1 and told[-1][1].startswith("epoch 1 of 0.1, loss ")
    assert not torch.equal(model.state_dict()["fc.weight"], before["fc.weight"])


def test_a_step_of_two_processes_is_the_step_of_one(tmp_path):
    """Without BatchNorm the weights are the same but for the order of the sums."""
    alone = small_network()
    training.fit(alone, batches(slice(None)), 4, CONFIG)
    store, weights = tmp_path / "store", tmp_path / "weights.pt"
    started = [
        subprocess.Popen(
            [sys.executable, __file__, str(store), str(weights), str(rank)],
            env=os.environ | {"GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": PYTHONPATH},
        )
        for rank in range(2)
    ]
    assert [process.wait(timeout=120) for process in started] == [0, 0]
    together = torch.load(weights, weights_only=True)
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(together[name], value, rtol=1e-3, atol=1e-5)
    assert not torch.equal(together["0.weight"], small_network().state_dict()["0.weight"])


def test_the_parts_of_a_batch_are_the_batch():
    source = open_workload(compress.Request())
    how = {"shuffle": True, "seed": 3, "preprocessing": source.preprocessing}
    whole = next(iter_numbered_batches(source.dataset.train, 64, **how))
    parts = [
        next(iter_numbered_batches(source.dataset.train, 64, part=slice(rank, None, 3), **how)) for rank in range(3)
    ]
    assert sorted(torch.cat([part[2] for part in parts]).tolist()) == sorted(whole[2].tolist())
    assert torch.equal(parts[1][0], whole[0][1::3]) and torch.equal(parts[1][1], whole[1][1::3])
    assert (
        steps.training_images(ask(), source, slice(0, None, 2)).per_epoch
        == steps.training_images(ask(), source).per_epoch
    )


def test_what_one_process_refuses_is_the_sentence_of_all(prepared):
    with pytest.raises(TrainingError, match="Training diverged: the loss became .* Try a tenth of that learning rate"):
        fine_tuned(prepared, ask(learning_rate=10, optimizer="sgd", finetune_epochs=1))


def test_a_process_that_is_killed_ends_the_others_and_says_so(prepared):
    killed = []

    def kill_one(fraction, text):
        if not killed:
            killed.extend(processes.find("compress.stages.data_parallel"))
            os.kill(killed[0], 9)

    with pytest.raises(TrainingError, match=r"ended without a result \(signal 9\); .*--training-processes 1"):
        fine_tuned(prepared, ask(finetune_epochs=5), kill_one)
    assert len(killed) == 2 and not processes.find("compress.stages.data_parallel")


def test_the_processes_end_with_the_one_that_started_them(prepared, tmp_path):
    (tmp_path / "request.json").write_text(ask(finetune_epochs=50).to_json())
    code = (
        "from pathlib import Path; from compress.stages import data_parallel as d; from compress.request import Request; import sys\n"
        "d.fine_tune(Request.from_file(sys.argv[1]), Path(sys.argv[2]), None, lambda *told: print('told', flush=True))"
    )
    words = [sys.executable, "-c", code, str(tmp_path / "request.json"), str(prepared)]
    parent = subprocess.Popen(words, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": PYTHONPATH})
    assert parent.stdout.readline() == b"told\n"
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + 20
    while processes.find("compress.stages.data_parallel") and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not processes.find("compress.stages.data_parallel")


@pytest.mark.parametrize(
    ("values", "text"),
    [
        (
            {"training_processes": 2, "train_batch_size": 3},
            "got 2, expected a whole number from 1 to 64, at most half of",
        ),
        (
            {"training_processes": 2, "model": "custom"},
            "expected 1, because other processes cannot build a module of your",
        ),
        ({"training_processes": 0}, "got 0, expected a whole number from 1 to 64"),
    ],
)
def test_what_cannot_be_shared_is_refused(values, text):
    with pytest.raises(RequestError, match=text):
        compress.Request(**values)


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    data_parallel.require_devices(2)
    with pytest.raises(RequestError, match="training_processes: got 3, expected at most 2, the number of GPUs of this"):
        data_parallel.require_devices(3)


# ---- a network without BatchNorm, and what its two processes do ---------------------------------------------------

CONFIG = training.TrainingConfig(
    epochs=3, learning_rate=0.01, distillation_weight=0.0, temperature=1.0, optimizer="sgd"
)


def small_network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))


def batches(part):
    def epoch(number):
        generator = torch.Generator().manual_seed(number)
        for _ in range(4):
            images = torch.rand(16, 3, 8, 8, generator=generator)
            labels = functional.one_hot((images.mean((1, 2, 3)) * 10).long() % 5, 5).argmax(1)
            yield images[part], labels[part]

    return epoch


def be_one_of_two(store, weights, rank):
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    model = small_network()
    training.fit(model, batches(slice(rank, None, 2)), 4, CONFIG)
    if rank == 0:
        torch.save(model.state_dict(), weights)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    be_one_of_two(sys.argv[1], sys.argv[2], int(sys.argv[3]))
