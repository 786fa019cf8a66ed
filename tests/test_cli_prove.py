"""``tracevault prove`` and ``tracevault verify-proof``: the file, and what is said of it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import pytest

pytest.importorskip("click", reason='needs the extra "cli"')
pytest.importorskip("rich", reason='needs the extra "cli"')
pytest.importorskip("cryptography", reason='needs the extra "seal"')

from tests.conftest import rows
from tests.test_cli import HOSTILE, Cli, cli, in_terminal, plain
from tests.test_prove import DATA, NAME, TABLE, VALUES, VKEY, Sealed, file_of, sealed, with_extra
from tracevault import verify_proof
from tracevault.integrity import note as notes
from tracevault.integrity.event_proof import EventProof
from tracevault.integrity.note import COSIGNATURE_V1, Signer

__all__ = ["cli", "sealed"]  # the fixtures

WITNESS = Signer("witness.example.org/w1", bytes(32), COSIGNATURE_V1)


def test_prove_writes_what_verify_proof_accepts(cli: Cli, sealed: Sealed, tmp_path: Path) -> None:
    (id_,) = sealed.emit(actor={"id": "ana", "type": "user"}, data=DATA)
    sealed.seal()
    done = cli("prove", str(id_), "--dsn", sealed.dsn)
    assert (done.code, done.err) == (0, "")
    assert verify_proof(done.out, [sealed.vkey]).values["id"] == str(id_)
    file = tmp_path / "a proof.tlog-proof"
    written = cli("prove", str(id_), "--dsn", sealed.dsn, "-o", str(file))
    assert (written.code, written.out) == (0, "")
    assert file.read_text() == done.out
    assert f"wrote '{file}': leaf 0 of {NAME}/{TABLE} at size 1\n" in written.err
    for name, stdin in ((str(file), ""), ("-", done.out)):
        said = cli("verify-proof", name, "--key", sealed.vkey, stdin=stdin)
        assert (said.code, said.err) == (0, "")
        found = json.loads(said.out)
        assert found.pop("event")["data"] == DATA
        assert len(found.pop("root")) == 64
        assert found == {
            "verified": True,
            "origin": f"{NAME}/{TABLE}",
            "tree": TABLE,
            "index": 0,
            "size": 1,
            "signed_by": [{"key": sealed.vkey, "at": None}],
        }


def test_prove_by_a_checkpoint_that_was_kept(cli: Cli, sealed: Sealed, tmp_path: Path) -> None:
    (id_,) = sealed.emit()
    sealed.seal()
    kept = tmp_path / "checkpoint"
    kept.write_text(str(sealed.note()))
    sealed.emit()
    sealed.seal()
    done = cli("prove", str(id_), "--dsn", sealed.dsn, "--checkpoint", str(kept))
    assert verify_proof(done.out, [sealed.vkey]).checkpoint.size == 1
    kept.write_text("no checkpoint")
    done = cli("prove", str(id_), "--dsn", sealed.dsn, "--checkpoint", str(kept))
    assert (done.code, done.out) == (3, "")
    assert "holds no signed checkpoint" in done.err
    done = cli("prove", str(id_), "--dsn", sealed.dsn, "--checkpoint", str(tmp_path / "missing"))
    assert (done.code, done.out) == (3, "")


def test_prove_refuses(cli: Cli, sealed: Sealed, tmp_path: Path) -> None:
    (id_,) = sealed.emit()
    sealed.seal()
    unknown = "01930000-0000-7000-8000-00000000000a"
    done = cli("prove", unknown, "--dsn", sealed.dsn)
    assert (done.code, done.out, done.err) == (1, "", f"not found: {unknown} in table audit_logs\n")
    assert cli("prove", "x", "--dsn", sealed.dsn).code == 2
    assert cli("prove", str(id_), "--dsn", sealed.dsn, "--index", "1").code == 2
    assert cli("prove", str(id_), "--dsn", sealed.dsn, "--table", "audit_user_events").code == 3
    rows(sealed.dsn, "ALTER TABLE audit_logs DISABLE TRIGGER USER")
    rows(sealed.dsn, "UPDATE audit_logs SET event = 'order.refunded'")
    file = tmp_path / "proof"
    done = cli("prove", str(id_), "--dsn", sealed.dsn, "-o", str(file))
    assert (done.code, done.out) == (3, "")
    assert "tampered with" in done.err
    assert "`tracevault verify --table audit_logs`" in done.err
    assert not file.exists()


def cosigned(values: Mapping[str, object], *, time: int = 1_790_000_000) -> str:
    proof = EventProof.parse(file_of(values))
    cosignature = WITNESS.sign(proof.proof.checkpoint.text, time=time)
    note = proof.proof.checkpoint.with_signatures([cosignature])
    return str(EventProof.make(proof.statement, proof.index, proof.proof.hashes, note))


def test_verify_proof_for_a_person(tmp_path: Path) -> None:
    file = tmp_path / "proof"
    file.write_text(cosigned({**VALUES, "occurred_at": 2**63 - 1, "actor_type": HOSTILE, "data": '{"a": 1.10}'}))
    done = in_terminal("verify-proof", str(file), "--key", VKEY, "--key", str(WITNESS.verifier))
    assert (done.code, done.err) == (0, "")
    assert "\x1b[1;32mPROVEN" in done.out
    text = re.sub(" +\n", "\n", plain(done.out))
    assert "\x1b" not in text
    assert "\x07" not in text
    held = "PROVEN  the log holds exactly this event, and held it at 2026-09-21T14:13:20.000Z"
    assert text.startswith(f"{held}\n\norder.paid\n")
    assert "actor \\x1b]0;title\\x07" in " ".join(text.split())
    assert "9,223,372,036,854,775,807 microseconds from 2000-01-01T00:00Z on" in text
    assert '\ndata\n  {"a": 1.10}\n' in text
    assert f"erased, or held back; its commitment: {'ab' * 32} " in " ".join(text.split())
    assert "leaf       2, counted from 0, of 7\n" in text
    assert "signed by  log.example.com/shop/audit_logs+" in text
    assert "cosigned   2026-09-21T14:13:20.000Z by witness.example.org/w1+" in text
    assert "not checked" not in text
    done = in_terminal("verify-proof", str(file), "--key", VKEY)
    assert "not checked  1 signature by keys that were not given" in plain(done.out)


def test_verify_proof_says_when_it_was_cosigned(cli: Cli) -> None:
    done = cli("verify-proof", "-", "--key", f"{VKEY}\n{WITNESS.verifier}\n", stdin=cosigned(VALUES))
    assert json.loads(done.out)["signed_by"] == [
        {"key": VKEY, "at": None},
        {"key": str(WITNESS.verifier), "at": "2026-09-21T14:13:20.000Z"},
    ]
    late = cosigned(VALUES, time=2**62)
    done = cli("verify-proof", "-", "--key", VKEY, "--key", str(WITNESS.verifier), stdin=late)
    assert done.code == 1
    assert "no year that a calendar has" in json.loads(done.out)["reason"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (file_of({**VALUES, "actor_id": "eve"}, hashed=VALUES), "leads to another root"),
        (file_of(VALUES, signer=Signer("log.example.com/eve/audit_logs", bytes(32))), "not signed by a known key"),
        (with_extra(file_of(VALUES), b"{}"), "no event of the format"),
        ("", "a proof begins with"),
        ("x" * 4_000_001, "more than 4000000 bytes"),
    ],
    ids=["another event", "another log", "no event", "empty", "too long"],
)
def test_what_is_not_proven(text: str, reason: str, cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "proof"
    file.write_text(text)
    done = cli("verify-proof", str(file), "--key", VKEY)
    assert (done.code, done.err) == (1, "")
    assert json.loads(done.out)["verified"] is False
    assert reason in json.loads(done.out)["reason"]
    done = cli("verify-proof", str(file), "--key", VKEY, "-o", "table")
    assert done.code == 1
    assert done.out.startswith("NOT PROVEN  ")
    assert "order.paid" not in done.out  # what is not proven is not shown


def test_verify_proof_of_bytes_that_are_no_text(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "proof"
    file.write_bytes(b"\xff\xfe")
    done = cli("verify-proof", str(file), "--key", VKEY)
    assert done.code == 1
    assert "not UTF-8" in done.out


def test_verify_proof_is_used_wrongly(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "proof"
    assert cli("verify-proof", str(file), "--key", VKEY).code == 3
    file.write_text(file_of(VALUES))
    assert cli("verify-proof", str(file)).code == 2
    assert cli("verify-proof", str(file), "--key", " ").code == 2
    done = cli("verify-proof", str(file), "--key", VKEY[:-4] + "AAA=")
    assert (done.code, done.out) == (2, "")
    assert "is no verifier key" in done.err

    def missing(module: str) -> None:
        raise ImportError(module)

    notes._public_key.cache_clear()
    monkeypatch.setattr(notes, "import_module", missing)
    done = cli("verify-proof", str(file), "--key", VKEY)
    assert (done.code, done.out) == (2, "")
    assert 'pip install "tracevault[seal]"' in done.err


@pytest.mark.parametrize(
    "payload", ["{\x1b", '{"a": 1e999999999}', "[" * 100_000, "9" * 5000], ids=lambda text: text[:9]
)
def test_a_payload_that_postgresql_would_not_print_is_shown_as_it_is(payload: str, cli: Cli) -> None:
    done = cli("verify-proof", "-", "--key", VKEY, stdin=file_of({**VALUES, "data": payload}))
    assert json.loads(done.out)["event"]["data"] == payload
