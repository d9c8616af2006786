"""Load of the host by others, energy, and rows.jsonl."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vila_deploy.bench import host_load
from vila_deploy.bench.conditions import machine_state
from vila_deploy.bench.energy import EnergyMeter
from vila_deploy.bench.host_load import LoadMonitor, is_noisy
from vila_deploy.bench.results_file import ResultsFile
from vila_deploy.utils.errors import VilaDeployError


def stat(path: Path, busy: int, stolen: int = 0) -> Path:
    path.write_text(f"cpu  {busy} 0 0 99999 50 0 0 {stolen} 0 0\ncpu0 1 2 3\n")
    return path


def test_work_of_others_is_all_work_but_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In 10 s all cores worked 15 s, of which 12 s were ours; 1 s was stolen: 0.4 of a core."""
    times, clock = iter([(0.0, 0.0), (10.0, 2.0)]), iter([100.0, 110.0])
    monkeypatch.setattr(host_load.os, "sysconf", lambda name: 100)
    monkeypatch.setattr(
        host_load.os, "times", lambda: type("T", (), dict(zip(("user", "system"), next(times),
                                                              strict=True)))
    )  # fmt: skip
    monkeypatch.setattr(host_load.time, "monotonic", lambda: next(clock))
    monitor = LoadMonitor(stat(tmp_path / "stat", 1000))
    stat(tmp_path / "stat", 1000 + 1500, stolen=100)
    load = monitor.load()
    assert load is not None
    assert (load.others_cores, load.stolen_cores) == pytest.approx((0.4, 0.1))


def test_noise_is_a_tenth_of_a_core() -> None:
    assert not is_noisy(0.0, 0.1, None)
    assert is_noisy(0.11, 0.0)
    assert is_noisy(0.0, 0.5)


def test_without_proc_nothing_is_known(tmp_path: Path) -> None:
    assert LoadMonitor(tmp_path / "none").load() is None
    assert EnergyMeter(tmp_path).joules() is None


def test_energy_of_packages_and_a_counter_that_begins_anew(tmp_path: Path) -> None:
    for name, value in (("intel-rapl:0", 9_000_000), ("intel-rapl:1", 100), ("intel-rapl:0:0", 7)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "energy_uj").write_text(f"{value}\n")
        (tmp_path / name / "max_energy_range_uj").write_text("10000000\n")
    meter = EnergyMeter(tmp_path)
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("1000000\n")
    (tmp_path / "intel-rapl:1" / "energy_uj").write_text("3000100\n")
    assert meter.joules() == pytest.approx(2 + 3)


def test_state_of_the_machine() -> None:
    state = machine_state(gpu=False)
    assert state["cores"].isdigit()
    assert "driver_version" not in state


def test_rows_survive_and_a_torn_last_line_is_dropped(tmp_path: Path) -> None:
    file = ResultsFile(tmp_path)
    assert file.read() == []
    file.append({"model": "a"})
    file.append({"model": "ß"})
    path = tmp_path / "rows.jsonl"
    whole = path.read_bytes()
    for end in range(len(whole) + 1):
        path.write_bytes(whole[:end])
        assert file.read() == [{"model": "a"}, {"model": "ß"}][: whole[:end].count(b"\n")]
        file.append({"model": "c"})
        assert file.read()[-1] == {"model": "c"}
    file.clear()
    assert file.read() == []


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"a": 1}) + "\n[1]\n")
    with pytest.raises(VilaDeployError, match=r"rows.jsonl: line 2 is no row; .*--fresh"):
        ResultsFile(tmp_path).read()
