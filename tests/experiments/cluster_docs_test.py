"""The recipes in docs/ are at least well formed, and agree with one another."""

import pathlib
import re

import pytest
import yaml

DOCS = pathlib.Path(__file__).parents[2] / "docs"


def load(name):
    return list(yaml.safe_load_all((DOCS / name).read_text()))


def test_ray_up_is_told_what_it_needs():
    (config,) = load("ray-cluster.yaml")
    assert config["provider"]["type"] == "local"
    assert config["provider"]["head_ip"] and config["provider"]["worker_ips"]
    assert config["auth"]["ssh_user"]
    head, worker = (
        config["head_start_ray_commands"],
        config["worker_start_ray_commands"],
    )
    assert "ray start --head" in head[-1] and "ray_bootstrap_config.yaml" in head[-1]
    assert "--address=$RAY_HEAD_IP:6379" in worker[-1]
    assert all("RAY_AUTH_MODE=token" in commands[-1] for commands in (head, worker))


@pytest.mark.ray
def test_ray_up_accepts_it():
    util = pytest.importorskip("ray.autoscaler._private.util")
    (config,) = load("ray-cluster.yaml")
    util.validate_config(util.prepare_config(config))


def test_kubernetes_is_told_what_it_needs():
    cluster, claim, policy = load("kuberay.yaml")
    assert (cluster["apiVersion"], cluster["kind"]) == ("ray.io/v1", "RayCluster")
    spec, name = cluster["spec"], cluster["metadata"]["name"]
    assert spec["authOptions"] == {"mode": "token"}
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    images = set()
    for group in groups:
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        images.add(container["image"])
        assert container["resources"]["limits"] == container["resources"]["requests"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        mounts = {mount["name"]: mount for mount in container["volumeMounts"]}
        assert volumes == set(mounts) and mounts["shm"]["mountPath"] == "/dev/shm"
    assert len(images) == 1  # the same versions everywhere
    claims = [
        v["persistentVolumeClaim"]["claimName"]
        for v in groups[0]["template"]["spec"]["volumes"]
        if v["name"] == "runs"
    ]
    assert claims == [claim["metadata"]["name"]]
    own = {"ray.io/cluster": name}
    assert policy["spec"]["podSelector"]["matchLabels"] == own
    assert policy["spec"]["ingress"][0]["from"][0]["podSelector"]["matchLabels"] == own


def test_both_recipes_fix_the_same_ports():
    text = (DOCS / "cluster.md").read_text()
    for name in ("ray-cluster.yaml", "cluster.md"):
        ports = re.findall(r"--([a-z-]+-port)=(\d+)", (DOCS / name).read_text())
        fixed = {
            option: {port for o, port in ports if o == option} for option, _ in ports
        }
        assert all(len(values) == 1 for values in fixed.values()), name
        assert all(f"--{option}" in text for option in fixed)
    for link in re.findall(r"\]\(([^:)#]+)\)", text):
        assert (DOCS / link).exists(), link
