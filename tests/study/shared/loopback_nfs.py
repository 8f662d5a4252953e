"""Two NFS clients of one server, all in namespaces of this machine: network, host names and mounts.

Each client has a network and a host name of its own, so that the server and the kernel take it for another machine.
"""

import contextlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest

CLIENTS = ("one", "two")
# $1: a folder for the mounts; $2: mount options. Prints "ready"; undoes all when its input ends.
_SCRIPT = """
set -e
end() {
  set +e
  for name in one two; do umount --force --lazy $1/$name; done
  rpc.nfsd 0
  kill $mountd $one $two
} 2>/dev/null
trap 'end "$1"' EXIT
ip link set lo up
for folder in /var/lib/nfs $1; do mount -t tmpfs tmpfs $folder; done
mkdir -p /var/lib/nfs/v4recovery /var/lib/nfs/rpc_pipefs $1/export $1/one $1/two
touch /var/lib/nfs/etab /var/lib/nfs/rmtab
mount -t nfsd nfsd /proc/fs/nfsd
exportfs -o rw,fsid=0,no_root_squash,no_subtree_check "10.77.0.0/16:$1/export"
rpc.mountd --foreground --no-nfs-version 3 & mountd=$!
rpc.nfsd --no-nfs-version 3 --lease-time 10 --grace-time 10 4
client() {
  ip link add $1 type veth peer name server netns $3
  ip address add 10.77.$2.1/24 dev $1
  ip link set $1 up
  nsenter --net --target $3 ip address add 10.77.$2.2/24 dev server
  nsenter --net --target $3 ip link set server up
  nsenter --net --uts --target $3 sh -c "hostname $1 && mount -t nfs4 -o '$5' 10.77.$2.1:/ $4/$1"
}
unshare --net --uts sleep infinity & one=$!
unshare --net --uts sleep infinity & two=$!
sleep 0.5
client one 1 $one $1 "$2"
client two 2 $two $1 "$2"
echo ready
read -r _ || true
"""
_TOOLS = ("exportfs", "rpc.nfsd", "rpc.mountd", "mount.nfs4", "ip", "unshare", "nsenter", "modprobe")
_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


def missing():
    """Return in words what this machine lacks, or None."""
    if os.geteuid() != 0:
        return "NFS is tested as root only, which may mount"
    if lacking := [tool for tool in _TOOLS if shutil.which(tool, path=_PATH) is None]:
        return f"NFS is tested with nfs-kernel-server, nfs-common and iproute2; {', '.join(lacking)} is missing"
    for module in ("nfsd", "nfsv4", "veth"):
        subprocess.run([shutil.which("modprobe", path=_PATH), "--quiet", module], check=False, capture_output=True)
    known = Path("/proc/filesystems").read_text().split()
    if lacking := [name for name in ("nfsd", "nfs4") if name not in known]:
        return f"this kernel has no NFS ({', '.join(lacking)} is missing): see nfs-test in the Makefile"
    return None


class Shares:
    """What the two clients see: ``shares.seen_by("one") / "x"`` and ``shares.seen_by("two") / "x"`` are one file."""

    def __init__(self, process, folder):
        self._process, self._folder = process, folder

    def seen_by(self, client):
        return Path(f"/proc/{self._process.pid}/root{self._folder}/{client}")

    def network(self, client, state):
        """Set the network of a client "up" or "down"."""
        enter = ["nsenter", "--net", "--target", str(self._process.pid)]
        subprocess.run([*enter, "ip", "link", "set", client, state], check=True, env={"PATH": _PATH})


@contextlib.contextmanager
def served(folder, options):
    """Yield Shares with these mount options. Skip the test, with the reason, if this machine cannot do it."""
    if (reason := missing()) is not None:
        pytest.skip(reason)
    folder.mkdir()
    command = ["unshare", "--mount", "--net", "--propagation", "private", "sh", "-c", _SCRIPT, "sh", folder, options]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={"PATH": _PATH}
    ) as process:
        try:
            said = []
            for line in process.stdout:
                said.append(line)
                if line == "ready\n":
                    break
            assert said[-1:] == ["ready\n"], "".join(said)
            yield Shares(process, folder)
        finally:
            process.stdin.close()
            process.wait(30)
