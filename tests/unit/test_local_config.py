"""The local cluster's configuration files against golden text."""

from dataclasses import replace
from pathlib import Path

import pytest

from strop.slurm.local_cluster import ClusterError, LocalCluster
from strop.slurm.local_config import Spec, cgroup_conf, gres_conf, parse_version, slurm_conf

GOLDEN = Path(__file__).parents[1] / "golden"
SPEC = Spec(
    name="demo",
    directory="/tmp/demo",
    host="laptop",
    user="ada",
    num_nodes=2,
    gpus_per_node=2,
    port=21000,
    slurm_version=(22, 5),
)


def test_slurm_conf_golden():
    assert slurm_conf(SPEC) == (GOLDEN / "local_slurm.conf").read_text()


def test_without_gpus_no_gres():
    bare = replace(SPEC, gpus_per_node=0)
    assert "gres" not in slurm_conf(bare).lower()
    assert gres_conf(bare) == ""


def test_gres_conf_names_one_file_per_gpu():
    assert gres_conf(SPEC) == (
        "AutoDetect=off\nName=gpu File=/tmp/demo/gpus/gpu0\nName=gpu File=/tmp/demo/gpus/gpu1\n"
    )


@pytest.mark.parametrize(
    ("version", "plugin"),  # the last one without "disabled" and the first one with it
    [((21, 8), "cgroup/v1"), ((23, 11), "cgroup/v1"), ((24, 5), "disabled"), ((25, 11), "disabled")],
)
def test_cgroup_plugin_by_version(version, plugin):
    assert cgroup_conf(version) == f"CgroupPlugin={plugin}\n"


@pytest.mark.parametrize(
    ("text", "version"),
    [("slurm-wlm 22.05.8\n", (22, 5)), ("slurm 24.05.1-rc2", (24, 5)), ("slurm 21.08.5", (21, 8))],
)
def test_parse_version(text, version):
    assert parse_version(text) == version


def test_spec_survives_json():
    assert Spec.from_json(SPEC.to_json()) == SPEC


def test_bad_name_is_refused():
    with pytest.raises(ClusterError, match="small letters"):
        LocalCluster("Two Words")


def test_foreign_directory_is_not_touched(tmp_path, monkeypatch):
    monkeypatch.setattr("strop.slurm.local_cluster.missing_binaries", lambda: [])
    folder = tmp_path.parent / "d"  # short: sockets lie in it
    folder.mkdir()
    (folder / "thesis.tex").write_text("precious")
    with pytest.raises(ClusterError, match="not a local cluster's"):
        LocalCluster("demo", folder).up()
    assert LocalCluster("demo", folder).down() is None
    assert [p.name for p in folder.iterdir()] == ["thesis.tex"]


def test_missing_slurm_names_the_apt_command(monkeypatch, tmp_path):
    monkeypatch.setattr("strop.slurm.local_cluster._which", lambda program: None)
    with pytest.raises(ClusterError, match=r"(?s)no munged, slurmctld.*apt-get install -y .*slurm-wlm munge"):
        LocalCluster("demo", tmp_path / "c").up()


@pytest.mark.parametrize("folder", ["it's", "two words", "50%", "a,b", "höhe"])
def test_folder_that_slurm_conf_cannot_name_is_refused(monkeypatch, tmp_path, folder):
    monkeypatch.setattr("strop.slurm.local_cluster.missing_binaries", lambda: [])
    with pytest.raises(ClusterError, match="special characters"):
        LocalCluster("demo", tmp_path / folder).up()


def test_too_long_directory_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr("strop.slurm.local_cluster.missing_binaries", lambda: [])
    with pytest.raises(ClusterError, match="too long"):
        LocalCluster("demo", tmp_path / ("x" * 80)).up()
