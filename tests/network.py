"""Hosts for a test: network namespaces of this machine, joined by a bridge."""

import os
import shutil
import signal
import subprocess
from contextlib import contextmanager

import pytest


@contextmanager
def network(hosts, *programs):
    """Make hosts, {name: IPv4 address}, all in one /24, each with the link eth0; at the end their processes die too.

    A host runs a command as `[*on(name), ...]`. Skips the test where there can be none, or where `programs` are not.
    """
    if os.geteuid() or not all(map(shutil.which, ("ip", *programs))):
        pytest.skip(f"needs root, iproute2 {' '.join(programs)}")
    switch = f"{''.join(hosts)}-switch"
    remove(switch, *hosts)
    try:
        ip("netns", "add", switch)
        ip("-n", switch, "link", "add", "br0", "up", "type", "bridge")
        for i, (name, address) in enumerate(hosts.items()):
            ip("netns", "add", name)
            ip("-n", switch, "link", "add", f"port{i}", "type", "veth", "peer", "name", "eth0", "netns", name)
            ip("-n", switch, "link", "set", f"port{i}", "master", "br0", "up")
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
            for link in ("lo", "eth0"):
                ip("-n", name, "link", "set", link, "up")
    except subprocess.CalledProcessError as error:
        remove(switch, *hosts)
        pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
    try:
        yield
    finally:
        remove(switch, *hosts)


def on(name):
    """The words before a command that a host is to run."""
    return ["ip", "netns", "exec", name]


def remove(*names):
    for name in names:
        for process in ip("netns", "pids", name, check=False).stdout.split():
            os.kill(int(process), signal.SIGKILL)
        ip("netns", "del", name, check=False)


def ip(*words, check=True):
    return subprocess.run(["ip", *words], check=check, capture_output=True, text=True)
