"""examples/serving run by podman: the image, its manifest (podman kube play), and the unit under a systemd in it.

make container-test builds the image from the wheel first. Of the manifest podman leaves out fsGroup, preStop and the
Service, and it asks the probes by curl, which the image lacks: they need a cluster.
"""

import json
import shutil
import subprocess
import time
from pathlib import Path

import openai
import pytest
from test_examples import EXAMPLES, listed
from tiny import make_llama

from mft.models.pretrained import save_model

IMAGE = "localhost/mft-serve"
INSIDE = Path("/var/lib/mft/masks")
TINY = [f"--model={INSIDE}/base", "--dtype=float32"]
LIST = f"code={INSIDE}/code\nmath={INSIDE}/math\n"
# What apt-get brings, and the paths that the unit's header makes; the packages are those of the image.
SYSTEMD = f"""
FROM {IMAGE}
USER 0
RUN apt-get update -q && apt-get install -qy --no-install-recommends systemd systemd-sysv dbus
RUN userdel mft; useradd --system --home-dir /var/cache/mft --shell /usr/sbin/nologin mft && \\
    rm -r /var/cache/mft && install -d /opt/mft/bin && ln -s "$(command -v mft)" /opt/mft/bin/mft
ENTRYPOINT ["/sbin/init"]
CMD []
"""


def podman(*words, given=None, check=True):
    done = subprocess.run(["podman", *map(str, words)], input=given, capture_output=True, text=True)
    assert not check or done.returncode == 0, f"podman {words}: {done.stdout}{done.stderr}"
    return done


def missing():
    if shutil.which("podman") is None:
        return "needs podman"
    if podman("image", "exists", IMAGE, check=False).returncode:
        return "needs the image mft-serve, which make container-test builds"
    return ""


pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(missing()), reason=missing())]


@pytest.fixture
def site(exports, words, tmp_path):
    """Return a folder with masks/ and etc/, which every user can read: the container's user is another one."""
    for task, directory in exports.items():
        shutil.copytree(directory, tmp_path / "masks" / task)
    save_model(make_llama(initializer_range=0.3), words, tmp_path / "masks" / "base")
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc" / "masks.txt").write_text(LIST)
    (tmp_path / "etc" / "api-keys").write_text("sk-one\n")
    subprocess.run(["chmod", "-R", "a+rX", tmp_path / "masks", tmp_path / "etc"], check=True)
    return tmp_path


def mounts(site):
    return ["-v", f"{site}/masks:{INSIDE}:ro", "-v", f"{site}/etc:/etc/mft:ro"]


@pytest.fixture
def name(request):
    """Return a name for what the test starts, and remove that afterwards."""
    yield (name := f"mft-test-{request.node.name.split('_')[1]}")
    podman("rm", "--force", "--volumes", "--time=1", name, check=False)


def until(condition, container, seconds=180):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, podman("logs", container, check=False)
        time.sleep(0.2)


def models(address, key="sk-one"):
    """Return the models that the server lists for the key; None if it does not answer yet."""
    try:
        with openai.OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0, timeout=60) as client:
            return [model.id for model in client.models.list()]
    except openai.APIConnectionError:
        return None


def answers(address, key="sk-one"):
    with pytest.raises(openai.AuthenticationError):
        models(address, "sk-two")
    with openai.OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0, timeout=60) as client:
        made = client.completions.create(model="code", prompt="1 2 3", max_tokens=4, temperature=0)
    return made.usage.completion_tokens > 0


def test_container_answers_reloads_and_stops(site, name):
    locked = ["--read-only", "--cap-drop=all", "--security-opt=no-new-privileges", "--stop-timeout=35"]
    podman("run", "-d", "--name", name, *locked, "-p", "127.0.0.1::8000", *mounts(site), IMAGE, *listed("CMD"), *TINY)
    address = f"http://{podman('port', name, '8000').stdout.strip()}"
    until(lambda: models(address) == ["base", "code", "math"], name)
    assert answers(address)
    status = dict(line.split(":", 1) for line in podman("exec", name, "cat", "/proc/1/status").stdout.splitlines())
    assert status["Uid"].split() == ["10001"] * 4
    assert (int(status["CapBnd"], 16), int(status["NoNewPrivs"])) == (0, 1)
    podman("healthcheck", "run", name)

    (site / "etc" / "masks.txt").write_text(LIST.splitlines()[0])
    podman("kill", "--signal=HUP", name)
    until(lambda: models(address) == ["base", "code"], name)
    podman("stop", name)
    assert podman("inspect", name, "--format={{.State.ExitCode}}").stdout.strip() == "0"
    logged = podman("logs", name)
    assert json.loads((logged.stdout + logged.stderr).splitlines()[-1])["event"] == "stopped"


def test_manifest_is_played(site, name):
    text = (EXAMPLES / "kubernetes.yaml").read_text()
    for old, new in {
        "registry.example/mft-serve:0.2.0": IMAGE,
        f"python={INSIDE}/python": f"code={INSIDE}/code",
        f"problems={INSIDE}/problems": f"math={INSIDE}/math",
        "alice replace-me\n": "alice sk-one-of-alice\n",
        "args:\n": "args:\n" + "".join(f"            - {each}\n" for each in TINY),
        "defaultMode: 0440": "defaultMode: 0444",  # without fsGroup
        # Under names of their own: podman keeps volumes, and takes them away again.
        "name: mft-serve\n": f"name: {name}\n",
        "mft-masks": f"{name}-masks",
        "mft-api-keys": f"{name}-keys",
        "mft-cache": f"{name}-cache",
        "name: tmp": f"name: {name}-tmp",
    }.items():
        assert old in text
        text = text.replace(old, new)
    (site / "manifest.yaml").write_text(text)
    tar = site / "masks.tar"
    subprocess.run(["tar", "-C", site / "masks", "-cf", tar, "."], check=True)
    podman("volume", "create", f"{name}-masks")
    container = f"{name}-pod-{name}"
    try:
        podman("volume", "import", f"{name}-masks", tar)
        podman("kube", "play", "--publish=127.0.0.1::8000", site / "manifest.yaml")
        address = f"http://{podman('port', container, '8000').stdout.strip()}"
        until(lambda: models(address, "sk-one-of-alice") == ["base", "code", "math"], container)
        assert answers(address, "sk-one-of-alice")
        podman("exec", container, "sh", "-c", "kill -HUP 1")
        until(lambda: '"reloaded"' in podman("logs", container).stdout, container)
    finally:
        podman("kube", "down", "--force", site / "manifest.yaml", check=False)
        podman("volume", "rm", "--force", f"{name}-keys", check=False)  # which podman leaves


def test_systemd_starts_reloads_and_stops_the_unit(site, name):
    """Privileged, as the unit's own sandbox needs rights to be set up; the server listens to the container alone."""
    built = podman("build", "--network=host", "-t", f"{name}-image", "-", given=SYSTEMD, check=False)
    if built.returncode:
        pytest.skip(f"systemd could not be fetched: {built.stderr[-200:]}")
    podman("run", "-d", "--name", name, "--systemd=always", "--privileged", f"{name}-image")

    def inside(command, check=True):
        return podman("exec", name, "sh", "-ec", command, check=check).stdout.strip()

    until(lambda: inside("systemctl is-system-running", check=False) in ("running", "degraded"), name)
    inside("mkdir -p /var/lib/mft /etc/mft")
    podman("cp", f"{site}/masks", f"{name}:{INSIDE}")
    podman("cp", EXAMPLES / "mft-serve.service", f"{name}:/etc/systemd/system/")
    inside(f"printf '{LIST}' > /root/masks.txt && echo sk-one > /root/api-keys")
    inside("cd /root && install -o root -g mft -m 640 masks.txt api-keys /etc/mft")
    inside(f"sed -i 's|^ExecStart=.*|& {' '.join(TINY)}|' /etc/systemd/system/mft-serve.service")
    inside("systemctl enable --now mft-serve")
    ask = "python -c \"import urllib.request as u; print(u.urlopen('http://127.0.0.1:8000/health/ready').status)\""
    until(lambda: inside(ask, check=False) == "200", name)
    status = inside("cat /proc/$(systemctl show mft-serve --property MainPID --value)/status")
    assert {"CapBnd:\t0000000000000000", "NoNewPrivs:\t1", "Seccomp:\t2"} <= {*status.splitlines()}
    inside("systemctl reload mft-serve")
    until(
        lambda: "serving base, code, math" in inside("journalctl --unit mft-serve | grep -A9 SIGHUP", check=False), name
    )
    inside("systemctl stop mft-serve")
    assert inside("systemctl show mft-serve --property Result --value") == "success"
    assert inside("journalctl --unit mft-serve --output cat | grep -c 'info stopped'") == "1"
