"""`import pipelines` offers the functions behind the commands, and costs nothing until one is used."""

import inspect
import subprocess
import sys

import pytest

import pipelines
from pipelines.machine import has_gpu_driver


def test_the_public_functions_are_those_behind_the_commands() -> None:
    from pipelines import extension_of, finetune, pretrain, probe
    from pipelines.drivers import classify, extend
    from pipelines.drivers import pretrain as pretraining

    assert (finetune, probe, pretrain) == (classify.finetune, classify.probe, pretraining.pretrain)
    assert extension_of is extend.extension_of
    assert pipelines.__all__ == ["extension_of", "finetune", "pretrain", "probe"]
    assert set(pipelines.__all__) <= set(dir(pipelines))


@pytest.mark.parametrize("name", pipelines.__all__)
def test_a_public_function_takes_a_config_and_documents_itself(name: str) -> None:
    function = getattr(pipelines, name)
    required = [p.name for p in inspect.signature(function).parameters.values() if p.default is p.empty]
    assert required == (["run", "overrides"] if name == "extension_of" else ["config"])
    assert function.__doc__


def test_prepare_is_always_the_package_and_an_unknown_name_is_an_attribute_error() -> None:
    from pipelines import prepare

    assert inspect.ismodule(prepare)
    with pytest.raises(AttributeError, match="no attribute 'sweep'"):
        pipelines.sweep  # noqa: B018


def test_importing_pipelines_loads_neither_ray_nor_torch_nor_mlflow() -> None:
    code = (
        "import sys, pipelines; dir(pipelines); from pipelines import config\n"
        "print(sorted({'ray', 'torch', 'mlflow', 'pipelines.drivers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.slow
def test_neither_a_driver_nor_trains_controller_imports_torch() -> None:
    code = (
        "import sys, pipelines.drivers.pretrain, pipelines.drivers.classify, tune.sweep\n"
        "import ray.train.v2.api.data_parallel_trainer, pipelines.drivers.process_group\n"
        "from pipelines.cluster import machine; print(machine().num_cores > 0 and 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"{has_gpu_driver()}\n"


def test_a_data_task_imports_no_torch() -> None:
    code = "import sys, pipelines.feed.data_task, pipelines.feed.windows; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
