"""What `accelerator`, `devices`, `num_nodes` and `strategy` mean: each row of the table in docs/multi_device.md.

Devices that are not here are put in at Lightning's accelerator interface; nothing else is.
"""

import logging
import re
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.accelerators import MPSAccelerator as FabricMPS
from lightning.pytorch.accelerators import MPSAccelerator
from lightning.pytorch.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_only

import scvi_lite
from scvi_lite.model import SCVI
from scvi_lite.train import launch, processes, strategies

DOC = Path(__file__).parents[1] / "docs" / "multi_device.md"
GPUS = [f"cuda:{i}" for i in range(4)]
# The call as in the document; devices in a script; devices in a notebook, where they differ.
TABLE = {
    '`devices="auto"` (the default)': (GPUS, GPUS[:1]),
    "`devices=1`": (GPUS[:1],),
    "`devices=2`": (GPUS[:2],),
    '`devices=-1` or `"-1"`': (GPUS,),
    '`devices=[0, 3]` or `"0, 3"`': ([GPUS[0], GPUS[3]],),
    '`devices=[3]` or `"3,"`': ([GPUS[3]],),
    '`devices="3"`': (GPUS[:3],),
    '`accelerator="gpu"` or `"cuda"`, `devices=2`': (GPUS[:2],),
    '`accelerator="cpu"`': (["cpu"],),
    '`accelerator="cpu"`, `devices=2`': (["cpu", "cpu"],),
    "`num_nodes=2`, `devices=4`": (GPUS, None),
}


def calls(row):
    """The calls that a row of the document shows: `name=value`, perhaps followed by other values of that name."""
    found = [{}]
    for part in row.replace("(the default)", "").split("`, `"):
        name, values = part.strip(" `").split("=", 1)
        values = [eval(value) for value in values.split("` or `")]
        found = [call | {name: value} for call in found for value in values]
    return found


ROWS = [(call, *where) for row, where in TABLE.items() for call in calls(row)]


@pytest.fixture
def here(monkeypatch):
    """A process that Lightning takes for the first, not in a notebook."""
    monkeypatch.setattr(rank_zero_only, "rank", 0)
    for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def four_gpus(here, monkeypatch):
    for place in ("fabric", "pytorch"):
        monkeypatch.setattr(f"lightning.{place}.accelerators.cuda.num_cuda_devices", lambda: 4)
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, *args, **kwargs: self)


@pytest.fixture
def notebook(monkeypatch):
    monkeypatch.setattr(strategies, "_IS_INTERACTIVE", True)
    monkeypatch.setattr("lightning.pytorch.trainer.connectors.accelerator_connector._IS_INTERACTIVE", True)


@pytest.fixture
def said(monkeypatch):
    """Lines of the package's log."""
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    strategies.logger.addHandler(handler)
    monkeypatch.setattr(strategies.logger, "level", logging.INFO)
    yield lines
    strategies.logger.removeHandler(handler)


@pytest.fixture(scope="module")
def adata():
    adata = scvi_lite.data.simulate(n_cells=60, n_genes=10, seed=0)
    SCVI.setup_anndata(adata, batch_key="batch")
    return adata


@pytest.fixture
def train(adata, monkeypatch):
    """`train(**options)` up to where the training would begin: gives the trainer, or what the launcher is given."""

    def train(**options):
        begun = []
        monkeypatch.setattr(pl.Trainer, "fit", lambda trainer, *args, **kwargs: begun.append(trainer))
        monkeypatch.setattr(launch, "launch", lambda *args: begun.append(args[3:]))
        SCVI(adata, n_latent=2).train(max_epochs=1, **options)
        (one,) = begun
        return one

    return train


def devices_of(trainer):
    several = isinstance(trainer.strategy, DDPStrategy)
    return [
        str(device) for device in (trainer.strategy.parallel_devices if several else [trainer.strategy.root_device])
    ]


def test_the_document_shows_these_rows():
    table = DOC.read_text().split("## What `accelerator`")[1].split("\n\n")[2]
    rows = [re.split(r"(?<!\\)\|", line)[1].strip() for line in table.strip().splitlines()[2:]]
    assert rows == [*TABLE, '`accelerator="gpu"` or `"mps"` on a Mac']


@pytest.mark.parametrize(("call", "devices"), [row[:2] for row in ROWS], ids=lambda value: str(value))
def test_script(call, devices, four_gpus, train, said):
    trainer = train(**call)
    assert devices_of(trainer) == devices
    assert trainer.num_nodes == call.get("num_nodes", 1)
    assert trainer.world_size == len(devices) * trainer.num_nodes
    (line,) = said
    assert all(name in line for name in devices)
    if trainer.world_size > 1:
        assert type(trainer.strategy) is DDPStrategy
        assert trainer.strategy.launcher is not None
        assert "by DDP" in line
    else:
        assert isinstance(trainer.strategy, SingleDeviceStrategy)
        assert line == f"Training on {devices[0]}."


@pytest.mark.parametrize(
    ("call", "devices"), [(row[0], row[-1]) for row in ROWS if row[-1]], ids=lambda value: str(value)
)
def test_notebook(call, devices, four_gpus, notebook, train, said):
    begun = train(**call)
    (line,) = said
    assert all(name in line for name in devices)
    if len(devices) > 1:
        options, n_workers = begun
        assert n_workers == len(devices)
        assert {name: options[name] for name in call} == call
        assert "fresh process" in line
    else:
        assert devices_of(begun) == devices


@pytest.mark.parametrize("call", [{}, {"accelerator": "gpu"}, {"accelerator": "mps"}, {"devices": 1}])
def test_mac(call, here, train, monkeypatch):
    for kind in (MPSAccelerator, FabricMPS):
        monkeypatch.setattr(kind, "is_available", staticmethod(lambda: True))
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, *args, **kwargs: self)
    assert devices_of(train(**call)) == ["mps:0"]
    with pytest.raises(ValueError, match="devices=2"):
        train(devices=2)


def test_without_a_gpu_auto_is_the_cpu(here, train, said):
    assert devices_of(train()) == ["cpu"]
    assert said == ["Training on cpu."]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"devices": 0}, "devices=0: give a number of devices, -1 for all"),
        ({"devices": -2}, "devices=-2: give a number of devices"),
        ({"devices": True}, "devices=True: give a number"),
        ({"devices": 5}, r"devices=5: .*only has: \[0, 1, 2, 3\]"),
        ({"devices": [0, 7]}, r"devices=\[0, 7\]: .*only has"),
        ({"devices": [1, 1]}, r"devices=\[1, 1\]: .*must be unique"),
        ({"devices": "many"}, "devices='many'"),
        ({"devices": [0, 1], "accelerator": "cpu"}, "Give the number of processes, as devices=2"),
        ({"accelerator": "cdua"}, "accelerator='cdua' is not an accelerator. Did you mean 'cuda'?"),
        ({"accelerator": "mps"}, "accelerator='mps'.*not available"),
        ({"strategy": "dpp"}, "strategy='dpp' is not a strategy. Did you mean 'ddp'?"),
        ({"strategy": 2}, "strategy=2: the name of a strategy"),
        ({"strategy": "ddp_fork"}, "Give strategy='ddp_notebook'"),
        ({"strategy": "ddp_fork_find_unused_parameters_true"}, "Give strategy='ddp_notebook'"),
        ({"strategy": DDPStrategy(start_method="fork")}, "start_method='fork'"),
        ({"strategy": "fsdp"}, "strategy='fsdp' spreads the weights.*Give strategy='ddp'"),
        ({"strategy": FSDPStrategy()}, "spreads the weights"),
        ({"strategy": "deepspeed_stage_2"}, "spreads the weights"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_refused_before_any_work(options, message, four_gpus, train, monkeypatch):
    monkeypatch.setattr("scvi_lite.model.training.load_for_training", lambda *args: pytest.fail("cells were read"))
    with pytest.raises(ValueError, match=f"(?s){message}"):
        train(**options)


def test_no_gpu_is_said_before_any_work(here, train):
    with pytest.raises(ValueError, match="accelerator='gpu', devices=2: No supported gpu"):
        train(accelerator="gpu", devices=2)


@pytest.mark.parametrize("name", ["ddp", "DDP", "ddp_find_unused_parameters_true", "ddp_find_unused_parameters_false"])
def test_names_of_ddp(name, here, train, notebook, monkeypatch):
    options, n_workers = train(strategy=name, accelerator="cpu", devices=2)
    assert (options["strategy"], n_workers) == (name, 2)
    for module in (strategies, pl.trainer.connectors.accelerator_connector):
        monkeypatch.setattr(module, "_IS_INTERACTIVE", False)
    assert type(train(strategy=name, accelerator="cpu", devices=2).strategy) is DDPStrategy


@pytest.mark.parametrize(
    "name",
    ["ddp_notebook", "ddp_spawn", "ddp_notebook_find_unused_parameters_true", "ddp_spawn_find_unused_parameters_true"],
)
def test_names_that_start_fresh_processes_also_in_a_script(name, here, train, said):
    options, n_workers = train(strategy=name, accelerator="cpu", devices=2)
    assert n_workers == 2
    assert strategies.worker_strategy(name) == name.replace("_notebook", "").replace("_spawn", "")
    assert devices_of(train(strategy=name, accelerator="cpu", devices=1)) == ["cpu"]
    assert said == ["Training on 2 devices (cpu), each in a fresh process.", "Training on cpu."]


def test_a_strategy_object_is_used_as_it_is(here, train, notebook, monkeypatch):
    strategy = DDPStrategy(find_unused_parameters=True)
    options, n_workers = train(strategy=strategy, accelerator="cpu", devices=2)
    assert strategies.worker_strategy(options["strategy"]) is strategy
    for module in (strategies, pl.trainer.connectors.accelerator_connector):
        monkeypatch.setattr(module, "_IS_INTERACTIVE", False)
    assert train(strategy=strategy, accelerator="cpu", devices=2).strategy is strategy


def test_several_machines_are_refused_in_a_notebook(here, train, notebook):
    with pytest.raises(ValueError, match="num_nodes=2: a notebook.*torchrun or srun"):
        train(num_nodes=2, devices=2, accelerator="cpu")


def test_a_strategy_that_brings_its_devices(here, train, notebook, said):
    strategy = DDPStrategy(parallel_devices=[torch.device("cpu")] * 3, process_group_backend="gloo")
    assert train(strategy=strategy)[1] == 3
    assert "3 devices" in said[0]


SLURM = {
    "SLURM_JOB_NAME": "train",
    "SLURM_NTASKS": "2",
    "SLURM_NTASKS_PER_NODE": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "0",
}
TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "none",
    "RANK": "1",
    "LOCAL_RANK": "1",
    "GROUP_RANK": "0",
    "WORLD_SIZE": "2",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "1",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}


@pytest.mark.parametrize(("variables", "kind"), [(SLURM, SLURMEnvironment), (TORCHRUN, TorchElasticEnvironment)])
def test_processes_that_others_started(variables, kind, here, train, said, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    trainer = train(accelerator="cpu", devices=2)
    assert type(trainer.strategy.cluster_environment) is kind
    assert (trainer.world_size, trainer.global_rank, trainer.local_rank) == (2, 1, 1)
    assert said == []  # the first rank says it
    with pytest.raises(ValueError, match="was itself started for a device"):
        train(accelerator="cpu", devices=2, strategy="ddp_notebook")


@pytest.mark.parametrize("variables", [SLURM, TORCHRUN], ids=["slurm", "torchrun"])
def test_a_notebook_is_not_confused_by_what_started_it(variables, here, train, notebook, said, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    _, n_workers = train(accelerator="cpu", devices=2)
    assert n_workers == 2
    assert rank_zero_only.rank == 0
    assert len(said) == 1
    variables = processes.environment(2)
    assert not [name for name in variables if name.startswith(("SLURM", "TORCHELASTIC", "GROUP"))]
    assert "RANK" not in variables
    assert variables["MASTER_PORT"] != "1"
