"""Steps of two processes with different numbers of micro-batches are those of one process."""

import pytest
import torch

from tests.support.processes import FSDP, two
from tests.support.two_process_steps import CASES, main

SHARED = [name for name, case in CASES.items() if case.model != "plain"]  # the loss is nothing new


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    main(str(folder))
    return torch.load(folder / "results.0.pt", weights_only=True)


@pytest.mark.parametrize(
    ("names", "settings"), [([*CASES], {}), (SHARED, FSDP)], ids=["each whole", "FSDP2"]
)
def test_ragged_steps_of_two_processes_are_those_of_one(names, settings, alone, tmp_path):
    two("-m", "tests.support.two_process_steps", tmp_path, *names, **settings)
    results = [torch.load(tmp_path / f"results.{rank}.pt", weights_only=True) for rank in (0, 1)]
    for name in names:
        one, first, second = (found[name] for found in (alone, *results))
        for key, value in one["weights"].items():
            assert torch.equal(first["weights"][key], second["weights"][key]), (name, key)
            if key == "forwards":  # statistics of the main process's rows
                assert 0 < first["weights"][key] < value, name
            else:
                found = first["weights"][key]
                torch.testing.assert_close(found, value, rtol=1e-9, atol=1e-12, msg=f"{name} {key}")
        # shares are padded; weights that no process uses are not sent, unless others of their unit are
        assert 0.5 < first["sent"] < 1.05, name
