"""Whatever ends a run, what it has measured is reported."""

from __future__ import annotations

import datetime
import ipaddress
import json
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from loadtest.load import command
from loadtest.load.journal import NAME
from loadtest.load.report.command import write_report
from tests.loadtest.conftest import ROOT, LoadTest, Simulated, command_of, scenario_of

OPEN: dict[str, Any] = {"loop": "open", "rates": [40], "requests": 12}


def test_every_beginning_of_a_journal_makes_a_report(
    load_test: LoadTest, tmp_path: Path, generator: torch.Generator, capsys: pytest.CaptureFixture[str]
) -> None:
    methods: dict[str, Any] = {"plain": {}, "sparse": {"sparse_prefill": "flexprefill"}, "failing": {"fault": "500"}}
    finished = load_test(scenario_of(tmp_path, methods, OPEN, tokens=3))
    lines = (finished.folder / NAME).read_text().splitlines(keepends=True)
    rng = random.Random(int(torch.randint(1 << 30, (1,), generator=generator)))
    whole = sum(json.loads(line)["kind"] == "request" for line in lines)
    for count in sorted({1, 2, len(lines), *rng.sample(range(1, len(lines)), 20)}):
        folder = tmp_path / f"first {count}"
        folder.mkdir()
        (folder / NAME).write_text("".join(lines[:count]) + '{"kind": "requ')
        assert not write_report(folder), "a run that did not come to its end has not passed"
        report = json.loads((folder / "report.json").read_text())
        sent = sum(len(stage["requests"]) for stage in report["stages"])
        assert sent == sum(json.loads(line)["kind"] == "request" for line in lines[:count]) <= whole
        assert (folder / "report.html").read_text().endswith("</html>\n")
    assert "FAILED: " in capsys.readouterr().out


def test_an_error_of_the_load_test_loses_nothing(
    simulated: Simulated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    mine = tmp_path / "mine.yaml"
    mine.write_text(yaml.safe_dump(scenario_of(tmp_path, {"plain": {}}, OPEN, warm_up_rounds=0, tokens=3)))
    monkeypatch.setattr("loadtest.load.overhead.Overhead.report", broken)
    with pytest.raises(OSError, match="No space left"):
        command.main([str(mine), "--url", simulated.url, "--out", str(tmp_path / "run")])
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert len(report["stages"][0]["requests"]) == 12
    assert not report["summary"]["verdict"]["passed"]


def test_what_cannot_be_read_is_said(simulated: Simulated, tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text(yaml.safe_dump(scenario_of(tmp_path, {"plain": {}}, OPEN)))
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")

    def said(*arguments: str) -> str:
        with pytest.raises(SystemExit) as caught:
            command.main([str(mine), "--url", simulated.url, "--out", str(tmp_path / "run"), *arguments])
        return str(caught.value.code)

    assert "--api-key-file" in said("--api-key-file", str(tmp_path / "gone"))
    assert "cannot be read" in said("--api-key-file", str(tmp_path / "binary"))
    assert "holds no key" in said("--api-key-file", str(tmp_path / "empty"))
    assert "--certificates" in said("--certificates", str(tmp_path / "gone"))
    assert "http://HOST:PORT or https://HOST:PORT is wanted" in said("--url", "localhost:8000")
    assert "without a path" in said("--url", f"{simulated.url}/v1")
    assert "cannot be made" in said("--out", str(mine / "run"))


def self_signed(path: Path) -> Path:
    """A key and its certificate for 127.0.0.1 in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "simulated")])
    now = datetime.datetime.now(datetime.UTC)
    names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(names, critical=False)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path.write_bytes(private + certificate.public_bytes(serialization.Encoding.PEM))
    return path


@pytest.mark.parametrize("clients", ["1", "2"])
def test_https_is_checked(tmp_path: Path, clients: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Against the file that is named, in client processes too; a certificate that nobody vouches for is refused."""
    certificate = self_signed(tmp_path / "pem")
    mine = tmp_path / "mine.yaml"
    mine.write_text(yaml.safe_dump(scenario_of(tmp_path, {"plain": {}}, OPEN, tokens=3)))
    server = Simulated(certificate)
    arguments = [str(mine), "--url", server.url, "--out", str(tmp_path / "run"), "--clients", clients]
    try:
        with pytest.raises(SystemExit) as caught:
            command.main(arguments)
        assert f"no OpenAI-compatible server answers at {server.url}" in str(caught.value.code)
        assert "certificate verify failed" in str(caught.value.code)
        command.main([*arguments, "--wait", "5", "--certificates", str(certificate)])
    finally:
        server.stop()
    assert "| plain  | 12/12" in capfd.readouterr().out


def test_proxies_of_the_environment_are_not_asked(simulated: Simulated, tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text(yaml.safe_dump(scenario_of(tmp_path, {"plain": {}}, OPEN, tokens=3)))
    nobody = "http://127.0.0.1:9"
    ended = subprocess.run(
        command_of(mine, simulated.url, tmp_path / "run", ["--wait", "5"]),
        cwd=ROOT,
        env={"PATH": "", "http_proxy": nobody, "HTTP_PROXY": nobody, "https_proxy": nobody, "all_proxy": nobody},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert "| plain  | 12/12" in ended.stdout
