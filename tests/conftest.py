"""Shared by all tests: two threads at most, and no test may leave torch's global state changed."""

import gpu_double
import pytest
import torch

torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture(autouse=True, scope="session")
def signing_key(tmp_path_factory):
    """Runs of the tests are signed with a key of their own, in child processes too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ESPALIER_SIGNING_KEY", str(tmp_path_factory.mktemp("key") / "signing.key"))
        yield


@pytest.fixture
def device(monkeypatch):
    """`device(release)` puts a GPU that is not there in place of the packages of that release, and returns it."""

    def put(release: str, **options) -> gpu_double.Gpu:
        double = gpu_double.Gpu(**options)
        gpu_double.install(monkeypatch, double, release)
        return double

    return put
