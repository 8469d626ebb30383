"""A fabric of one switch and four hosts in ibsim, and the real OpenSM on it."""

import os
import shutil
import subprocess
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HOSTS = ("Pe0", "Pe1", "De0", "De1")
PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
TOOLS = ("ibsim", "opensm", "smpquery", "ibnetdiscover", "saquery")
LIBRARY = next(
    (found for place in ("*/", "") for found in Path("/usr/lib").glob(f"{place}umad2sim/libumad2sim.so")), None
)


def missing() -> str | None:
    """Why there can be no simulated fabric here."""
    lacking = [tool for tool in TOOLS if shutil.which(tool, path=PATH) is None]
    if lacking or LIBRARY is None:
        return f"there is no {', '.join(lacking) or 'libumad2sim'}: apt-get install ibsim-utils opensm infiniband-diags"
    return None


class Fabric:
    """A running ibsim. `environment` makes programs see it instead of this host's devices."""

    def __init__(self, folder: Path, simulator: subprocess.Popen[str], environment: dict[str, str]) -> None:
        self.folder = folder
        self.environment = environment
        self._simulator = simulator

    def run(self, command: list[str], host: str = HOSTS[0]) -> subprocess.CompletedProcess[str]:
        """Runs a program on a host; ibsim's library leaves a folder where a killed one ran."""
        seen = self.environment | {"SIM_HOST": host}
        return subprocess.run(command, cwd=self.folder, env=seen, capture_output=True, text=True, timeout=120)

    def order(self, line: str, hosts: int) -> None:
        """Types a line at ibsim's console, and waits until so many hosts have a link."""
        assert self._simulator.stdin is not None
        self._simulator.stdin.write(f"{line}\n")
        self._simulator.stdin.flush()
        self.wait_for(hosts)

    def wait_for(self, hosts: int) -> None:
        """Waits until ibsim shows so many hosts with a link."""
        deadline = time.monotonic() + 60
        seen = ""
        while time.monotonic() < deadline:
            assert self._simulator.poll() is None, "ibsim ended"
            seen = self._discovered()
            if sum(line.startswith("CA ") for line in seen.splitlines()) == hosts:
                return
            time.sleep(0.05)
        raise AssertionError(f"not {hosts} hosts: {seen}")

    def sweep(self, options: str, policy: str) -> None:
        """OpenSM programs the fabric once, and exits."""
        command = [*self._opensm(options, policy), "-o"]
        subprocess.run(
            command, cwd=self.folder, env=self._for_opensm(), check=True, timeout=60, stdout=subprocess.DEVNULL
        )

    @contextmanager
    def managed(self, options: str, policy: str) -> Iterator[None]:
        """OpenSM programs the fabric, and answers for its paths."""
        log = self.folder / "osm.log"
        options += "force_log_flush TRUE\n"
        manager = subprocess.Popen(
            self._opensm(options, policy),
            cwd=self.folder,
            env=self._for_opensm(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            deadline = time.monotonic() + 60
            while not (log.exists() and "SUBNET UP" in log.read_text()):
                assert manager.poll() is None and time.monotonic() < deadline, "OpenSM does not bring the subnet up"
                time.sleep(0.05)
            yield
        finally:
            manager.kill()
            manager.wait(timeout=30)

    def lids(self) -> dict[str, int]:
        """The hosts' LIDs by port GUID."""
        rows = [line.split() for line in self._discovered().splitlines() if line.startswith("CA ")]
        return {guid: int(lid) for _, lid, _, guid, *_ in rows}

    def _discovered(self) -> str:
        command = [shutil.which("ibnetdiscover", path=PATH) or "ibnetdiscover", "-p"]
        return self.run(command).stdout

    def path_level(self, source_lid: int, target_lid: int) -> int:
        """The service level that OpenSM gives a path."""
        path = f"{source_lid}:{target_lid}"
        command = [shutil.which("saquery", path=PATH) or "saquery", "PR", "--src-to-dst", path]
        shown = self.run(command, host=HOSTS[1]).stdout
        return int(next(line for line in shown.splitlines() if line.strip().startswith("sl.")).rpartition("x")[2], 16)

    def _opensm(self, options: str, policy: str) -> list[str]:
        options = options.replace("/etc/opensm/qos-policy.conf", str(self.folder / "qos-policy.conf"))
        (self.folder / "opensm.conf").write_text(options)
        (self.folder / "qos-policy.conf").write_text(policy)
        files = ["-F", str(self.folder / "opensm.conf"), "-f", str(self.folder / "osm.log")]
        return [shutil.which("opensm", path=PATH) or "opensm", *files]

    def _for_opensm(self) -> dict[str, str]:
        return self.environment | {"OSM_CACHE_DIR": str(self.folder), "OSM_TMP_DIR": str(self.folder)}


@contextmanager
def fabric(folder: Path) -> Iterator[Fabric]:
    """Starts ibsim with an unmanaged fabric."""
    ports = "".join(f'[{n}] "{host}"[1]\n' for n, host in enumerate(HOSTS, 1))
    hosts = "".join(f'\nHca 1 "{host}"\n[1] "Sw1"[{n}]\n' for n, host in enumerate(HOSTS, 1))
    (folder / "net").write_text(f'Switch 8 "Sw1"\n{ports}{hosts}')
    name = {"IBSIM_SOCKNAME": f"dualpath-{uuid.uuid4().hex[:12]}"}
    simulator = subprocess.Popen(
        [shutil.which("ibsim", path=PATH) or "ibsim", "-s", str(folder / "net")],
        env=os.environ | name,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    environment = dict(os.environ) | name | {"LD_PRELOAD": str(LIBRARY), "SIM_HOST": HOSTS[0], "PATH": PATH}
    try:
        running = Fabric(folder, simulator, environment)
        running.wait_for(len(HOSTS))
        yield running
    finally:
        simulator.kill()
        simulator.communicate(timeout=30)
