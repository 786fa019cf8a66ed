"""Signing keys: who may read them, what is printed of them, and what never is."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

import pytest

from tests.test_cli import Cli, cli
from tracevault import ConfigError
from tracevault.config import SIGNING_KEY, command_environment
from tracevault.integrity.note import COSIGNATURE_V1, Signer, Verifier
from tracevault.sealing import keys

__all__ = ["cli"]  # the fixture

NAME = "log.example.com/shop"


def key_file(folder: Path, *signers: Signer, mode: int = 0o600) -> Path:
    path = folder / "seal.key"
    path.write_text("".join(f"{signer.encode()}\n" for signer in signers or [Signer.generate(NAME)]))
    path.chmod(mode)
    return path


def secrets_of(path: Path) -> list[str]:
    return [line.split("+", 4)[4] for line in path.read_text().splitlines()]


def test_keygen_makes_a_file_and_prints_what_verifies(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "seal.key"
    done = cli("keygen", NAME, "-o", str(path), "--table", "audit_logs", "--table", "audit_user_events")
    assert done.code == 0
    (signer,) = keys.read_keys(path)
    assert signer.verifier.name == NAME
    names = [f"{NAME}/audit_logs", f"{NAME}/audit_user_events"]
    assert done.out.splitlines() == [str(signer.renamed(name).verifier) for name in names]
    assert [Verifier.parse(line).name for line in done.out.splitlines()] == names
    assert "whoever verifies" in done.err
    assert "Keep it safe" in done.err
    assert "note:" not in done.err
    assert cli("keygen", "--show", str(path)).out == done.out.splitlines(keepends=True)[0]
    (secret,) = secrets_of(path)
    assert secret not in done.out + done.err


@pytest.mark.parametrize("umask", [0o000, 0o077, 0o777], ids=oct)
def test_a_key_file_has_mode_0600(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        keys.write_key(tmp_path / "seal.key", Signer.generate(NAME))
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "seal.key").stat().st_mode) == 0o600


def test_keygen_never_overwrites(cli: Cli, tmp_path: Path) -> None:
    path = key_file(tmp_path)
    before = path.read_bytes()
    done = cli("keygen", NAME, "-o", str(path))
    assert (done.code, done.out) == (2, "")
    assert "exists already" in done.err
    assert path.read_bytes() == before


def test_a_key_that_could_not_be_synced_is_not_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(ConfigError, match="Input/output error"):
        keys.write_key(tmp_path / "seal.key", Signer.generate(NAME))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [[], [NAME], ["-o", "x"], ["--show", "x", NAME], ["--show", "x", "-o", "y"], [NAME, "-o", "x", "--table", "a-b"]],
    ids=" ".join,
)
def test_keygen_refuses(cli: Cli, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = cli("keygen", *arguments)
    assert (done.code, done.out) == (2, "")
    assert list(tmp_path.iterdir()) == []


def test_keygen_without_cryptography_names_the_extra(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "cryptography"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "cryptography", None)
    done = cli("keygen", NAME, "-o", str(tmp_path / "seal.key"))
    assert done.code == 2
    assert "tracevault[seal]" in done.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o601, 0o666], ids=oct)
def test_a_key_file_that_is_open_to_others_is_refused(cli: Cli, mode: int, tmp_path: Path) -> None:
    path = key_file(tmp_path, mode=mode)
    with pytest.raises(ConfigError, match=rf"mode {mode:04o}.*chmod 600"):
        keys.read_keys(path)
    assert cli("keygen", "--show", str(path)).code == 2
    path.chmod(0o400)
    assert len(keys.read_keys(path)) == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_key_file_of_somebody_else_is_refused(tmp_path: Path) -> None:
    path = key_file(tmp_path)
    os.chown(path, 54321, -1)
    with pytest.raises(ConfigError, match="belongs to user 54321"):
        keys.read_keys(path)


def test_what_is_no_key_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"No such file.*keygen"):
        keys.read_keys(tmp_path / "none")
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo, 0o600)
    with pytest.raises(ConfigError, match="no regular file"):
        keys.read_keys(fifo)
    with pytest.raises(ConfigError, match="no regular file"):
        keys.read_keys(tmp_path)
    path = key_file(tmp_path)
    for data in (b"\xff\xfe", b"# x\n" * 20_000, b"", b"\n# only a comment\n"):
        path.write_bytes(data)
        with pytest.raises(ConfigError, match=r"no key file|holds no signing key"):
            keys.read_keys(path)


def test_a_link_to_a_key_file_is_followed(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(key_file(tmp_path))
    assert len(keys.read_keys(tmp_path / "link")) == 1


def test_no_message_and_no_repr_tells_a_secret(tmp_path: Path) -> None:
    signer = Signer.generate(NAME)
    secret = signer.encode().split("+", 4)[4]  # base64 has the sign as well
    for line in (signer.encode()[:-1], signer.encode() + "=", secret, "x" + signer.encode(), signer.encode() + "+x"):
        path = tmp_path / "seal.key"
        path.write_text(f"# mine\n\n{line}\n")
        path.chmod(0o600)
        with pytest.raises(ConfigError, match="line 3 of the key file") as caught:
            keys.read_keys(path)
        assert secret[:-4] not in str(caught.value)
        assert caught.value.__cause__ is None
        assert caught.value.__suppress_context__
    assert secret not in repr(signer)
    assert secret not in repr([signer])


def test_several_keys_of_one_name(cli: Cli, tmp_path: Path) -> None:
    old, new = Signer.generate(NAME), Signer.generate(NAME)
    path = key_file(tmp_path, old, new)
    assert [signer.verifier.key_id for signer in keys.read_keys(path)] == [old.verifier.key_id, new.verifier.key_id]
    shown = cli("keygen", "--show", str(path), "--table", "t").out.splitlines()
    assert shown == [str(signer.renamed(f"{NAME}/t").verifier) for signer in (old, new)]
    with pytest.raises(ConfigError, match="given twice"):
        keys.read_keys(key_file(tmp_path, old, old))
    with pytest.raises(ConfigError, match="one name"):
        keys.read_keys(key_file(tmp_path, old, Signer.generate("log.example.com/other")))
    with pytest.raises(ConfigError, match="no signing key"):
        keys.check_signers([])


def test_a_key_for_cosignatures_does_not_sign_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="line 1"):
        keys.read_keys(key_file(tmp_path, Signer(NAME, bytes(32), COSIGNATURE_V1)))


def test_keys_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SIGNING_KEY, raising=False)
    assert keys.environment_keys() == []
    monkeypatch.setenv(SIGNING_KEY, " \n")
    assert keys.environment_keys() == []
    signers = [Signer.generate(NAME), Signer.generate(NAME)]
    monkeypatch.setenv(SIGNING_KEY, "\n".join(signer.encode() for signer in signers))
    assert [one.encode() for one in keys.environment_keys()] == [one.encode() for one in signers]
    monkeypatch.setenv(SIGNING_KEY, "hunter2")
    with pytest.raises(ConfigError, match=f"line 1 of {SIGNING_KEY}") as caught:
        keys.environment_keys()
    assert "hunter2" not in str(caught.value)
    # What is run for the operator does not get it.
    assert SIGNING_KEY not in command_environment()
    assert command_environment(A="1")["A"] == "1"
    assert set(os.environ) - set(command_environment()) == {SIGNING_KEY}


@pytest.mark.parametrize(
    "name",
    [
        *("", " ", "a b", "a\tb", "a\u00a0b", "a\u2028b", "a+b", "/a", "a/", "a//b", "a/../b", ".", "a\x00b", "a\x1bb"),
        *("https://log.example.com/shop", "a" * 201, "a\u202eb"),
    ],
    ids=ascii,
)
def test_names_that_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="name") as caught:
        keys.check_key_name(name)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("name", "advice"),
    [(NAME, None), ("shop", "is no domain"), ("localhost/shop", "is no domain"), ("log.example.com", "deployment")],
)
def test_advice_on_names(cli: Cli, name: str, advice: str | None, tmp_path: Path) -> None:
    assert keys.check_key_name(name) == name
    said = keys.name_advice(name)
    assert said is None if advice is None else advice in str(said)
    done = cli("keygen", name, "-o", str(tmp_path / "k"))
    assert done.code == 0
    assert (f"note: {said}" in done.err) == (advice is not None)
