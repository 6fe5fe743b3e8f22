"""Studies on a real Ray cluster of two nodes on this machine."""

import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gradleak.studies import executors
from gradleak.studies.run import Plan, run
from gradleak.studies.study import OtherVersion, tasks
from toy_study import Setting, toy

ray = pytest.importorskip("ray")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head with one CPU."""
    from ray.cluster_utils import Cluster

    os.environ["RAY_AUTH_MODE"] = "disabled"  # or a token is written to the home folder
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's own
        try:
            made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
            ray.init(address=made.address, log_to_driver=False, logging_level=40)
        except Exception as error:  # noqa: BLE001 (whatever Ray says where it cannot start)
            pytest.skip(f"no Ray cluster can be started here: {error}")
        yield made
        ray.shutdown()
        made.shutdown()  # type: ignore[no-untyped-call]


pytestmark = pytest.mark.filterwarnings("ignore")


def test_a_node_is_killed_in_the_middle_and_the_study_ends_complete(cluster: Any, tmp_path: Path) -> None:
    """Cells are longer than it takes to notice; each group of two is one task, half of which may be done when its node dies."""
    (tmp_path / "marks").mkdir()
    settings = [Setting(n, str(tmp_path / "marks"), seconds=0.2) for n in range(16)]
    study = toy(settings, together=lambda setting: setting.number // 2)
    node, finished = cluster.add_node(num_cpus=1), [0]

    def start(name: str) -> Any:
        def on_step(step: int, steps: int, value: float) -> None:
            finished[0] = step
            if step == 3:
                cluster.remove_node(node, allow_graceful=False)

        return on_step

    table = run(Plan(study=study, out=tmp_path / "ray", where="ray"), start=start)
    assert finished[0] == 16
    assert not table.failed
    assert [row["square"] for row in table.rows] == [n**2 for n in range(16)]
    assert table.rows == run(Plan(study=study, out=tmp_path / "here")).rows
    assert len(run(Plan(study=study, out=tmp_path / "ray", where="ray")).rows) == 16


def test_a_cell_that_fails_and_one_that_kills_its_worker(cluster: Any, tmp_path: Path) -> None:
    (tmp_path / "marks").mkdir()
    marks = str(tmp_path / "marks")
    settings = [Setting(0), Setting(1, marks, "fail"), Setting(2, marks, "die"), Setting(3, marks, "die once")]
    table = run(Plan(study=toy(settings), out=tmp_path / "out", where="ray"))
    assert [row["number"] for row in table.rows] == [0, 3]
    assert {row["number"]: row["note"].split(":")[0] for row in table.failed} == {
        1: "ValueError",
        2: "Ray lost it 2 times",
    }


def test_a_worker_with_another_version_is_refused(cluster: Any, tmp_path: Path) -> None:
    plan = Plan(study=toy([Setting(1)]), out=tmp_path / "out", where="ray")
    cells = plan.cells()
    work = tasks(plan.study, cells, [cells[0].id], plan.bench, "another")
    with pytest.raises(OtherVersion, match="and the study another: install the same"):
        list(executors.on_ray(work))
